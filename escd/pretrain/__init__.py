"""Training of the `mini` backbone: ``python -m escd.pretrain [autoencoder towers unet filters]``."""
