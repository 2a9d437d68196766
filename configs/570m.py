# 570M: 569,808,384 parameters (arXiv 2508.02189). Prepare the data first: docs/data.md#the-papers-data
# torchrun --standalone --nproc_per_node=8 train.py configs/570m.py
data = "data/dolma"
out_dir = "out/570m"

d_model = 1536  # the rest is the default: 12 layers, 12 heads, 4 key-value heads, 50304 ids, context 2048

# 8 sequences x 4 micro-steps x 8 GPUs = 256 sequences x 2048 tokens = 524,288 tokens an update, vanilla.
# On n GPUs: 32 / n micro-steps, which must be a multiple of meta_blocks = 2.
# Half of the micro-steps, the default, read episodes: an update then has 262,144 tokens of next-token
# prediction, and 16 episodes of 32 x (4 + 4) windows x 128 = 32,768 tokens.
global_batch_size = 256
batch_size = 8  # per GPU: 28 GiB by bench.py --plan, so 40 GB suffice; 16 would take 48 GiB

# Schedule and share of episodes are the defaults, the paper's. Three settings differ, since with the paper's
# the inner loop does not adapt (configs/published.py, docs/inner-loop.md): the head is linear, it starts at
# zero, and its inner rate is 25.6 / d_model. And there are 4 queries, not 1: only queries give a gradient.
queries = 4
