"""Shows what a source of training data holds, on one web page.

`python -m data_pipelines.inspect SOURCE --out=inspect.html` looks at a sample of the records, always the same one:
pictures after the crop, as the model sees them, with their captions; sizes, aspect ratios, caption lengths, padding;
records that come twice; broken records by cause. The page is one file that loads nothing and runs no script.
"""

from __future__ import annotations

import argparse
import base64
import collections
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from data_pipelines import images
from data_pipelines.arrayrecords import printable
from data_pipelines.doors import add_crop_flags, add_source_flags, one_sentence, positive
from data_pipelines.duplicates import equal_groups, near_groups
from data_pipelines.figures import caption_table, cause_table, crop_table, figures, speed
from data_pipelines.images import Size
from data_pipelines.records import BadRecord, Source
from data_pipelines.sources import open_source
from data_pipelines.survey import Seen, Survey, cropped, sample, survey
from data_pipelines.text import load_tokenizer

NEAR = 8  # bits of 64: encoding anew and resizing change up to 4, different photographs differ in 20 and more
_SIDE = 512  # longer side of a picture on the page, at most
_EXAMPLES = 3  # messages of a cause
_GROUPS = 8  # of duplicates that are shown, and how many pictures of each
_LETTERS = 600  # of a caption


class Picture(NamedTuple):
    """A record on the page."""

    address: str  # its picture, as a data: address
    width: int
    height: int
    caption: str
    about: Sequence[str]


def main(arguments: list[str] | None = None) -> None:
    """Parses, looks, and writes the page."""
    options = parser().parse_args(arguments)
    with one_sentence():
        sizes = images.crop_sizes(options.resolution, options.patch_size, options.max_ratio)
        out = Path(options.out)
        if not out.parent.is_dir():
            raise FileNotFoundError(f"--out {out} lies in a folder that does not exist: make it, or choose another")
        if out.is_dir():
            raise IsADirectoryError(f"--out {out} is a folder: name a file, such as {out / 'inspect.html'}")
        tokenizer = load_tokenizer(options.tokenizer)
        source = open_source(options.source, options.root)
        found = survey(source, sizes, tokenizer, options.limit)
        text = page(source, found, sizes, vars(options))
        out.write_text(text, encoding="utf-8")
    causes = collections.Counter(broken.cause for broken in found.broken)
    listed = "".join(f", {count} {cause}" for cause, count in causes.most_common())
    print(f"{len(found.seen) + len(found.broken):,} of {len(source):,} records: {len(found.seen):,} usable{listed}")
    if not found.seen:
        print(f"none of them can be used: {printable(found.broken[0].message)}")
    print(out)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(prog="python -m data_pipelines.inspect", description=__doc__, allow_abbrev=False)
    add_source_flags(flags)
    add = flags.add_argument
    add("--out", default="inspect.html", help="the page (default: %(default)s)")
    add("--resolution", type=positive, default=256, help="side in pixels of the square crop (default: %(default)s)")
    add_crop_flags(flags)
    add("--tokenizer", metavar="FOLDER", help="counts the tokens of captions; by default bytes are counted")
    add("--samples", type=positive, default=36, help="pictures on the contact sheet (default: %(default)s)")
    add("--limit", type=positive, default=2000, help="the most records to look at (default: %(default)s)")
    return flags


def page(source: Source, found: Survey, sizes: Sequence[Size], settings: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
      source: what was looked at.
      found: in it.
      sizes: what its images may be cropped to.
      settings: the values of all flags, by name.
    """
    from jinja2 import Environment

    template = resources.files("data_pipelines").joinpath("inspect.html.j2").read_text(encoding="utf-8")
    seen, by_index = found.seen, {each.index: each for each in found.seen}
    chosen = [i for i in sample(len(source), settings["limit"]) if i in by_index][: settings["samples"]]
    equal = equal_groups([each.content for each in seen])
    # A group of near duplicates that is one of equal files is told once.
    near = [
        group
        for group in near_groups([each.likeness for each in seen], NEAR)
        if len({seen[i].content for i in group}) > 1
    ]

    def pictures(places: Sequence[int]) -> list[Picture]:
        shown = (_picture(source, by_index[i], sizes, settings["patch_size"]) for i in places)
        return [picture for picture in shown if picture]

    def shown_groups(groups: Sequence[Sequence[int]]) -> list[list[Picture]]:
        largest = sorted(groups, key=len, reverse=True)[:_GROUPS]
        return [pictures([seen[i].index for i in group[:_GROUPS]]) for group in largest]

    text = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            name=source.name.rstrip("/").rpartition("/")[2] or source.name,
            settings={key: value for key, value in settings.items() if value is not None},
            total=len(source),
            looked_at=len(seen) + len(found.broken),
            usable=len(seen),
            sheet=pictures(sorted(chosen)),
            figures=figures(seen, settings["resolution"], settings["patch_size"], bool(settings["tokenizer"])),
            crops=crop_table(seen, settings["patch_size"]),
            captions=caption_table(seen),
            causes=cause_table(found.broken, _EXAMPLES),
            extra_copies=sum(len(group) - 1 for group in equal),
            num_near=len(near),
            equal=shown_groups(equal),
            near=shown_groups(near),
            speed=speed(found),
        )
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair, which JSON can hold, is no text


def _picture(source: Source, seen: Seen, sizes: Sequence[Size], patch_size: int) -> Picture | None:
    """None where the record cannot be read a second time."""
    try:
        image = cropped(source, seen.index, sizes)
    except BadRecord:
        return None
    width, height = image.size
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    text = max(seen.captions, key=lambda caption: caption.weight).text if seen.captions else ""
    about = [f"{seen.size[0]} × {seen.size[1]} px", f"{height // patch_size} × {width // patch_size} patches"]
    if seen.share_cut >= 0.005:
        about.append(f"{seen.share_cut:.0%} cut away")
    if len(seen.captions) > 1:
        about.append(f"1 of {len(seen.captions)} captions")
    address = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return Picture(address, *image.size, _shortened(text), about)


def _shortened(text: str) -> str:
    return text if len(text) <= _LETTERS else text[:_LETTERS] + "…"


if __name__ == "__main__":
    main()
