# 181M: 181,095,168 parameters (arXiv 2508.02189). Data, schedule, deviations from the paper: 570m.py.
# torchrun --standalone --nproc_per_node=8 train.py configs/181m.py
data = "data/dolma"
out_dir = "out/181m"
d_model = 768

# 16 sequences x 2 micro-steps x 8 GPUs: on average one of an update's two micro-steps reads episodes.
queries = 4
