# 570M: 569,808,384 parameters (arXiv 2508.02189). Prepare the data first, for instance with
# python prepare.py --out=data/fineweb --source=HuggingFaceFW/fineweb-edu:sample-10BT \
#     --max_tokens=4_000_000_000 --tokenizer=gpt2
# torchrun --standalone --nproc_per_node=8 train.py configs/570m.py
data = "data/fineweb"
out_dir = "out/570m"

d_model = 1536  # the rest is the default: 12 layers, 12 heads, 4 key-value heads, 50304 ids, context 2048

# 8 sequences x 4 micro-steps x 8 GPUs = 256 sequences x 2048 tokens = 524,288 tokens an update, vanilla.
# On n GPUs: 32 / n micro-steps, which must be a multiple of meta_blocks = 2.
# A micro-step of episodes reads 32 x (4 + 4) windows x 128 = 32,768 tokens, where one of next-token
# prediction reads 8 x 2048 = 16,384; so halving batch_size doubles the episodes of an update.
global_batch_size = 256
batch_size = 8  # per GPU: 28 GiB by bench.py --plan, so 40 GB do; 16 would take 48 GiB

# The schedule is the default, the paper's. Where settings differ from it, and why: docs/differences.md.
queries = 4
meta_share = 0.1
meta_start = 0.5
meta_weight = 0.1
