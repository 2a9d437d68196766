# 11M: 11,282,784 parameters (arXiv 2508.02189). Data, schedule, deviations from the paper: 570m.py.
# torchrun --standalone --nproc_per_node=8 train.py configs/11m.py
data = "data/dolma"
out_dir = "out/11m"
d_model = 96

# 16 sequences x 2 micro-steps x 8 GPUs: on average one of an update's two micro-steps reads episodes.
queries = 4
