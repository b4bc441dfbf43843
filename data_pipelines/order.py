"""Which record stands at which place: randomness as a function of a key alone, and a process's share of a batch."""

from __future__ import annotations

import functools

import numpy as np
from grain.experimental import index_shuffle  # a second, and JAX with it: its library has no public name of its own

# First word of every key that randomness is drawn from, so that no two uses share one.
ORDER_KEY, DROPOUT_KEY, STEPS_KEY, CROP_KEY, CAPTION_KEY, MIXTURE_KEY, RATIO_KEY = range(7)


def random_word(*key: int) -> int:
    """32 uniform bits that depend on the key alone; numpy keeps SeedSequence's values over its versions."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def shuffled_index(place: int, length: int, seed: int, epoch: int, key: int = ORDER_KEY) -> int:
    """What stands at one place of a pseudo-random permutation of [0, length), a new one for each (key, seed, epoch)."""
    if length > 2**32:
        raise ValueError(f"{length} records cannot be shuffled; at most 2^32")
    return index_shuffle(place, max_index=length - 1, seed=_word_of_epoch(key, seed, epoch), rounds=4)


_word_of_epoch = functools.lru_cache(maxsize=64)(random_word)  # asked for at every place of an epoch


def share_of(batch_size: int, process_index: int, process_count: int) -> range:
    """The slots of a global batch that one process fills.

    Raises:
      ValueError: the batch is empty or does not divide over the processes, or there is no such process.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is no number of records; choose {process_count} or a multiple of it")
    if batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} does not divide over {process_count} processes; "
            f"choose {max(batch_size // process_count, 1) * process_count} or another multiple of {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not in 0 to {process_count - 1}")
    size = batch_size // process_count
    return range(process_index * size, (process_index + 1) * size)


def check_seed(seed: int) -> None:
    """Raises ValueError unless it is 32 bits."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} is not in 0 to 2^32 - 1")
