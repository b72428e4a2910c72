"""What a run has trained, as a folder that others load: diffusers, our own recipes, or anything that reads safetensors.

`latent_diffusion` writes pipelines, `autoencoder` and `latent_network` what recipes load, `weights_file` plain safetensors.
"""
