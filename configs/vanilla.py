# Overlay: only ordinary next-token prediction, on the same sequences in the same order.
# python train.py configs/11m.py configs/vanilla.py --out_dir=out/11m-vanilla
meta_share = 0.0
