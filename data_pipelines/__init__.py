"""The host side of training: captioned image files in, fixed-shape numpy batches out.

`sources` reads records, `images` decodes and crops, `text` formats and tokenises captions, and `batches` joins them
into whole global batches that depend on nothing but (seed, step); those of `grids` are images of one size, without
captions. Only numpy, Pillow and Grain are needed, and transformers where a tokeniser folder is given; nothing here
imports `svg_jax` or touches a device.
"""
