"""Every value of a text-to-image training run, with what it means; the other files change a few of them.

Values are marked (released) where the PyTorch release states them, (inferred) where they follow from what is published,
(ours) otherwise.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from svg_jax.models.autoencoder import AutoencoderConfig
from svg_jax.models.gemma2 import Gemma2Config
from svg_jax.models.next_dit import NextDiTConfig


def section(sizes: Any) -> ConfigDict:
    """The fields of a dataclass as config values; where the default is None, a flag may give a number."""
    return ConfigDict({k: placeholder(float) if v is None else v for k, v in dataclasses.asdict(sizes).items()})


def get_config() -> ConfigDict:
    """The 2.6B model at 256 px."""
    config = ConfigDict()
    config.seed = 0
    # (ours) the release states no steps: the four stages together see 274M images, as its checkpoint's name says
    config.num_train_steps = 250_000
    config.batch_size = 512  # global (released default: 4 nodes x 8 GPUs x 16)
    config.micro_batches = 1  # parts of the batch that run one after the other
    config.init_from = placeholder(str)  # workdir whose EMA weights this run starts from
    config.log_every = 50  # steps

    # The diffusion transformer.
    config.model = section(NextDiTConfig.next_dit_2p6b(dtype="bfloat16", remat="full"))

    # Frozen: pixels -> features. Without a checkpoint, a random stand-in of these sizes, good for smoke tests only.
    config.autoencoder = ConfigDict(dataclasses.asdict(AutoencoderConfig.svg_p(dtype="bfloat16")))
    config.autoencoder.checkpoint = placeholder(str)  # workdir of train_autoencoder, or a converted release

    # Frozen: caption -> features. Without them, a byte-level tokeniser and a random stand-in of these sizes.
    config.text = ConfigDict()
    config.text.encoder = section(Gemma2Config.gemma2_2b(dtype="bfloat16"))
    config.text.checkpoint = placeholder(str)  # converted Gemma-2-2B
    config.text.tokenizer = placeholder(str)  # folder with its tokeniser, as transformers saves it
    config.text.max_tokens = 512  # (released scripts)
    config.text.max_tokens_packed = placeholder(int)  # of all captions of a sequence, where data.pack is above 1
    config.text.system_prompt = placeholder(
        str
    )  # by default the kind of record says in training, and `base` in sampling

    config.data = ConfigDict()
    config.data.path = placeholder(str)  # a list, mixture, folder or shards, see data_pipelines/sources.py
    config.data.root = placeholder(str)  # what relative image paths are relative to; the file's folder by default
    config.data.resolution = 256  # pixels a side of the square whose patches are the token budget
    config.data.max_ratio = 4.0  # (released) of the sides of a crop
    config.data.caption_dropout = 0.1  # (released)
    config.data.pack = 1  # (released) images that share a sequence, each seeing itself and its caption only
    config.data.max_bad_fraction = 0.01  # (ours) a run stops when more records than this cannot be read
    add_reading(config)

    config.flow = ConfigDict()
    config.flow.path = "Linear"  # (released)
    config.flow.times = "lognorm"  # (released scripts)
    config.flow.mu = 0.0  # (released)
    config.flow.shift = True  # (released) toward noise, by the token budget

    config.optim = ConfigDict()
    config.optim.lr = 2e-4  # (released scripts)
    config.optim.schedule = "constant"  # (released); linear and cosine decay to zero
    config.optim.warmup_steps = 0  # (released)
    config.optim.b1 = 0.9  # (released)
    config.optim.b2 = 0.95  # (released)
    config.optim.eps = 1e-15  # (released)
    config.optim.weight_decay = 0.0  # (released)
    config.optim.clip = 2.0  # (released) global norm of the gradient
    config.optim.ema = 0.95  # (released): a short average; 0.9999 is usual elsewhere
    config.optim.ema_on_host = False  # keeps the average in the memory of the host
    config.optim.mu_dtype = placeholder(str)  # of the first moment: "bfloat16" halves it; by default as the parameters

    add_running(config)

    # Picture grids from the EMA weights during training, and the defaults of `svg_jax.sample`.
    config.sample = ConfigDict()
    config.sample.every = 2000  # steps; 0 for none
    config.sample.prompts = (
        "a red fox asleep in fresh snow",
        "a wooden desk with three books and a green lamp",
        "an astronaut riding a horse, oil on canvas",
        "a bowl of ramen seen from above",
    )
    config.sample.num_steps = 50  # (released)
    config.sample.solver = "dpm++2m"  # (released): a name in svg_jax.flow.solvers.SOLVERS
    config.sample.guidance_scale = 4.0  # (released)
    config.sample.renorm = 1.0  # (released)
    config.sample.guidance_interval = (0.0, 1.0)  # (released): times at which guidance acts; 0 is noise
    config.sample.shift = 10.0  # (released) toward noise
    config.sample.batch_size = 4

    # FID of the EMA weights during training: scalar `eval/fid`, the number of `python -m svg_jax.evaluate fid`.
    config.eval = ConfigDict()
    config.eval.fid_every = 0  # steps; 0: never
    config.eval.fid_samples = 5_000  # (ours) pictures each time: for a trend; what is quoted needs 10,000 and more
    config.eval.fid_batch_size = 0  # (ours) pictures at a time; 0: four a device
    config.eval.fid_reference = placeholder(str)  # .npz of `svg_jax.evaluate fid --save-statistics`, or pytorch-fid's
    config.eval.fid_inception = placeholder(str)  # workdir of the Inception of FID
    config.eval.fid_prompts = placeholder(str)  # .txt, .json or .jsonl; by default captions of the training data
    return config


def add_reading(config: ConfigDict) -> None:
    """How the host reads. The order of the data depends on none of it, and all may change when a run goes on."""
    config.data.num_threads = 8  # records read at the same time, in each worker
    config.data.num_workers = 0  # (ours) processes that read, a host; 0: the training process alone
    config.data.prefetch = 8  # batches held on the host
    # Of images at gs://, s3:// or http(s)://, see data_pipelines/files.py. Then the record is skipped.
    config.data.remote = ConfigDict(dict(timeout=30.0, retries=4, backoff=1.0))  # (ours) seconds, times, seconds


def add_running(config: ConfigDict) -> None:
    """What every training run has, whatever it trains: where it runs, what it saves, what watches over it."""
    # Devices an axis, see svg_jax/parallel.py; -1: those that are left, `data` and `fsdp` sharing them.
    config.mesh = ConfigDict(dict(data=-1, fsdp=-1, context=1, tensor=1))

    # Which processes there are. Found out on Cloud TPU, GKE, Slurm and Open MPI; elsewhere to be said to each.
    config.cluster = ConfigDict()
    config.cluster.coordinator = placeholder(str)  # "host:port" of process 0
    config.cluster.num_processes = placeholder(int)
    config.cluster.process_id = placeholder(int)
    config.cluster.timeout = 100.0  # seconds without a sign of life after which a process is gone, and the job ends
    config.cluster.start_timeout = 300.0  # seconds in which all must have started

    config.guard = ConfigDict()
    config.guard.max_skipped = 10  # (ours) steps in a row without a finite gradient, after which the run stops
    config.guard.spike_sigma = 6.0  # (ours) standard deviations above the mean at which a loss is reported; 0: never

    config.profile = ConfigDict()
    config.profile.start = 0  # step at which a trace begins; 0: never
    config.profile.steps = 5  # in a trace

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 2000  # steps (released)
    config.checkpoint.keep = 3
    config.checkpoint.keep_every = 50_000  # steps whose checkpoint is kept for good
