# On top of configs/demo.py: 10 M tokens of next-token prediction, or as many FLOPs; details.md says why.
max_steps = 2442  # x 4,096 tokens, of a vanilla run; plan.py gives the others as many FLOPs
lr = 2e-3  # of 1e-3, 2e-3 and 4e-3 the best for vanilla training, at a sixth of this length
warmup_steps = 100
meta_start = 244  # a tenth of the run
meta_weight = 0.5

eval_every = 148
eval_sequences = 128
probe_every = 37
log_every = 37
checkpoint_every = 407
keep = 1
report = False
