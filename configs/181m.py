# 181M: 181,095,168 parameters (arXiv 2508.02189). Prepare the data first, for instance:
# python data.py --out=data/fineweb --source=HuggingFaceFW/fineweb-edu --tokenizer=gpt2
# torchrun --standalone --nproc_per_node=8 train.py configs/181m.py
data = "data/fineweb"
out_dir = "out/181m"

d_model = 768  # the rest of the model is the default: 12 layers, 12 heads, 4 key-value heads, 50304 ids, context 2048

# 256 sequences x 2048 tokens = 524,288 tokens per update, 3.1 G in 6,000 updates (half of them in episodes).
# On 8 GPUs: 16 sequences x 2 micro-steps x 8 = 256. On n GPUs: 16 / n micro-steps, a multiple of meta_draws.
global_batch_size = 256
batch_size = 16  # per GPU; not measured on one yet: halve it where memory runs out

# The paper's schedule: AdamW at 3e-4, 2,500 updates of warm-up, linear decay, 6,000 updates; half the micro-steps are
# episodes, 32-way 4-shot with 10 inner steps. Those are the defaults of train.py.

# Where we deviate:
# - Only the head adapts, a linear one that starts at zero (the paper: 4 layers of width 128, started at random). With the
#   published head and rates it does not move in 10 steps: adapted accuracy stays at chance (README, "The inner loop").
# - The rate goes with 1 / d_model, since the squared norm of a normalised feature is d_model: 0.1 was best at 256.
# - 4 queries instead of 1: only the query gives an outer gradient. 32 x (4 + 4) windows x 128 = 32,768 tokens an episode.
inner_lr = 25.6 / d_model
queries = 4
