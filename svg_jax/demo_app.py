"""A web page to draw pictures on: `python -m svg_jax.demo_app --checkpoint=weights`. Needs the `demo` extra.

The page and its server speak with nobody else: no analytics, no fonts or scripts from elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image

from svg_jax.config import one_sentence
from svg_jax.flow.solvers import SOLVERS
from svg_jax.pipeline import Job, SVGPipeline

if TYPE_CHECKING:
    import gradio

Shown = tuple[list[Image.Image], dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    """Parses, loads, serves until it is interrupted."""
    options = parser().parse_args(arguments)
    logging.getLogger("svg_jax").setLevel(logging.INFO)
    with one_sentence():
        gr = load_gradio()  # before the weights: what is missing is said at once
        page = build(SVGPipeline.from_checkpoint(options.checkpoint))
        theme = gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"])
        page.launch(
            server_name=options.host,
            server_port=options.port,
            share=options.share == "yes",
            theme=theme,
            show_error=True,  # what nobody foresaw, out of memory say, is told on the page too
            footer_links=[],
        )


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(prog="python -m svg_jax.demo_app", description=__doc__, allow_abbrev=False)
    add = flags.add_argument
    add(
        "--checkpoint",
        required=True,
        help="folder that `svg_jax.convert import` made, or the workdir of a training run",
    )
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    add("--port", type=int, default=7860)
    add("--share", choices=("no", "yes"), default="no", help="a public address, tunnelled by gradio.live")
    return flags


def load_gradio() -> Any:
    """The library, with its analytics off.

    Raises:
        ImportError: It is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ImportError('the web page needs gradio: run `pip install "svg_jax[demo]"`') from error
    return gradio


def build(pipe: SVGPipeline) -> gradio.Blocks:
    """The page. What it shows first, and what is left empty, is as the checkpoint's config has it.

    Raises:
        ImportError: Gradio is not installed.
    """
    gr = load_gradio()
    default = pipe.settings()

    def draw(prompt: str, num_images: int, *values: Any, progress: Any = gr.Progress()) -> Iterator[Shown]:  # noqa: B008
        options = dict(zip(names, values, strict=True))
        images: list[Image.Image] = []
        try:
            settings = pipe.settings(**options, batch_size=1)  # one by one, so that each is seen when it is done
            progress((0, num_images), unit="pictures")
            for batch in pipe.stream([Job(prompt, sample=i) for i in range(num_images)], settings):
                images += [picture.image for picture in batch]
                progress((len(images), num_images), unit="pictures")
                yield images, {"prompt": prompt, **dataclasses.asdict(settings)}
        except (ValueError, MemoryError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="svg_jax", delete_cache=(3600, 86400)) as page, gr.Row():
        with gr.Column(scale=2, min_width=340):
            gr.Markdown("## Text to image")
            prompt = gr.Textbox(label="Prompt", lines=3, autofocus=True)
            negative_prompt = gr.Textbox(default.negative_prompt, label="Negative prompt")
            with gr.Row():
                width = gr.Number(default.width, label="Width", precision=0, min_width=80)
                height = gr.Number(default.height, label="Height", precision=0, min_width=80)
                solver = gr.Dropdown(list(SOLVERS), value=default.solver, label="Solver", min_width=120)
            num_steps = gr.Slider(1, max(100, default.num_steps), default.num_steps, step=1, label="Steps")
            guidance = max(15, default.guidance_scale)
            guidance_scale = gr.Slider(1, guidance, default.guidance_scale, step=0.1, label="Guidance (1 is none)")
            num_images = gr.Slider(1, 16, 1, step=1, label="Pictures")
            with gr.Row(equal_height=True):
                seed = gr.Number(default.seed, label="Seed", precision=0, min_width=120)
                new_seed = gr.Button("New seed", min_width=80)
                button = gr.Button("Draw", variant="primary", min_width=80)
            gr.Examples([[example] for example in pipe.config.sample.prompts], prompt, label="For example")
        with gr.Column(scale=3, min_width=340):
            gallery = gr.Gallery(show_label=False, format="png", object_fit="contain", height=640, interactive=False)
            with gr.Accordion("Settings of these pictures", open=False):
                shown = gr.JSON(show_label=False)

        fields = {
            "negative_prompt": negative_prompt,
            "width": width,
            "height": height,
            "num_steps": num_steps,
            "guidance_scale": guidance_scale,
            "solver": solver,
            "seed": seed,
        }
        names = list(fields)
        new_seed.click(lambda: random.randrange(2**32), outputs=seed)
        gr.on(
            [button.click, prompt.submit],
            draw,
            inputs=[prompt, num_images, *fields.values()],
            outputs=[gallery, shown],
            show_progress_on=gallery,
        )
    return page


if __name__ == "__main__":
    main()
