"""Training of the `mini` backbone: ``python -m escd.pretrain [autoencoder words unet towers filters]``."""
