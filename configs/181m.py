# 181M: 181,095,168 parameters (arXiv 2508.02189). Schedule, data, deviations from the paper: 570m.py.
# torchrun --standalone --nproc_per_node=8 train.py configs/181m.py
data = "data/fineweb"
out_dir = "out/181m"
d_model = 768

# By default 16 sequences x 2 micro-steps x 8 GPUs = 256 x 2048 = 524,288 tokens an update, vanilla. A
# micro-step of episodes reads 32 x (4 + 4) windows x 128 = 32,768 tokens, as many as one of 16 x 2048.
queries = 4
meta_share = 0.1
meta_start = 0.5
meta_weight = 0.1
