# 65M: 64,595,328 parameters (arXiv 2508.02189). Data, schedule, deviations from the paper: 570m.py.
# torchrun --standalone --nproc_per_node=8 train.py configs/65m.py
data = "data/dolma"
out_dir = "out/65m"
d_model = 384

# 16 sequences x 2 micro-steps x 8 GPUs: on average one of an update's two micro-steps reads episodes.
queries = 4
