# Overlay: head and inner loop as published (arXiv 2508.02189): four layers, started at random, one query.
# Ten steps at this rate hardly move the head: the query loss stays near ln(ways), and the run warns about it.
# Why: docs/inner-loop.md.
# python train.py configs/11m.py configs/published.py --out_dir=out/11m-published
head_layers = 4
head_width = 128
head_start = "random"
inner_lr = 1e-3  # 1e-2 in another version of the published code
queries = 1
