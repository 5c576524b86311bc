"""The offline pipeline: a pretrained network in, one manifold checkpoint out."""
