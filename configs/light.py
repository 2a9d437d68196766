# Overlay: late, light episodes: a tenth of the micro-steps of the second half, at a tenth of the weight.
# At the demo's size and ten times its length they cost 0.01 nats, where half of all micro-steps cost 0.29,
# and bring most of the adaptation at the mask that episodes can bring (results/details.md).
# python train.py configs/11m.py configs/light.py --out_dir=out/11m-light
meta_share = 0.1
meta_start = 0.5  # of the run
meta_weight = 0.1
