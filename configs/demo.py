# A laptop's five minutes: 3.7M parameters, on the documentation that every Python has on disk (2.6 M tokens).
# python train.py configs/demo.py
# torchrun --standalone --nproc_per_node=2 train.py configs/demo.py --out_dir=out/demo2
out_dir = "out/demo"

d_model = 192
n_layers = 4
n_heads = 6
n_kv_heads = 2
vocab_size = 4096  # the tokenizer learned from the corpus
context = 128

# 32 sequences x 128 tokens = 4,096 tokens an update, vanilla: 4 micro-steps of 8, in 2 blocks of one kind
# each. An episode is 16 x (4 + 2) windows x 32 = 3,072 tokens and takes about as long as 1,024 tokens of
# next-token prediction.
global_batch_size = 32
batch_size = 8
max_steps = 400

# Measured in 500 updates: accuracy at the mask 0.24, validation loss 5.28 at 4e-3; 0.32 and 5.14 at 2e-3.
lr = 2e-3
warmup_steps = 0.16  # of the run: 64 updates

# By default, as in the paper, half of the micro-steps read episodes from the first update on; light.py has
# fewer. Why this inner rate: docs/inner-loop.md.
ways = 16
window = 32
queries = 2
inner_lr = 0.1

eval_every = 50
probe_every = 5  # 2.5% of the time; with fewer probes, curves are too short for a verdict
checkpoint_every = 200
