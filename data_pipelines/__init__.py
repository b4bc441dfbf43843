"""The host side of training: captioned images in, fixed-shape numpy batches out.

    records                             what passes between the parts, where it comes from, and why a record is skipped
    sources                             opens any of: lists  mixture  folders  arrayrecords  tars  parquet  prepared
    stores                              what the shards of a data set share
    files, cache                        bytes, here or remote; indices and copies that are made once
    images, sizes, captions, text       decode and crop; sizes of all images; choose a caption, tokenise it
    order, batches, grids, packing      whole global batches that depend on nothing but (seed, step)
    fingerprint                         what a data set is known by, on other hosts and when a run goes on
    fingerprint                         what a data set is known by, so that no run goes on with another one
    broken, loader                      records that are skipped; threads and processes that read ahead
    pack, pack_shard                    any source -> ArrayRecord shards (a command)
    inspect, survey, figures, histogram, duplicates     any source -> a page that shows it (a command)
    doors                               flags and errors of the two commands

Nothing here imports `svg_jax` or touches a device; JAX is loaded by Grain, and not used. NumPy, Pillow and Grain are
enough for local lists and folders; what else a source needs is imported when one is opened, and missing libraries are
named with their extra.
"""
