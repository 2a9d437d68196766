# Overlay: few, late, light episodes: a tenth of the second half's micro-steps, at a tenth of the weight.
# At the demo's size and six times its length they cost 0.01 nats, where half of all micro-steps at half the
# weight cost 0.29, and reach nearly the same accuracy at the mask (results/details.md).
# python train.py configs/11m.py configs/light.py --out_dir=out/11m-light
meta_share = 0.1
meta_start = 0.5  # of the run
meta_weight = 0.1
