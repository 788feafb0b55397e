"""The pretrained model: a latent diffusion model and an image tower. It knows nothing of the method."""
