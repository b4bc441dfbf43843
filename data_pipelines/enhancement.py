"""Prompt enhancement: what the language model is asked to make of a short prompt, and how its answer is cleaned.

The SVG-T2I release lets the text encoder itself, Gemma-2 with its output head, write the longer prompt.
"""

from __future__ import annotations

_REQUEST = """\
You are an assistant that rewrites image generation prompts.
Given a user prompt, rewrite it into a more detailed and concrete visual description.
You MUST strictly preserve:
- the main subject(s) and their roles;
- the number of each entity (do not change counts like 'one', 'two', 'three');
- explicit attributes (e.g. colors, sizes, poses) that appear in the user prompt;
- explicit spatial relationships (left/right, front/behind, on top of, in the background, etc.);
- explicit style or format constraints (e.g. '3D render', 'line art', 'pixel art', 'photograph').
You may only add a few plausible visual details (textures, lighting, background context) that do NOT contradict \
any part of the original prompt.
Avoid repeating the same subject or action multiple times; keep the description concise.
Do not remove or alter any constraints given in the user prompt.
Do NOT mention the words 'User Prompt' or 'Enhanced Prompt' in your answer.
Output only the enhanced description as one or two sentences.

User prompt: """
_ANSWER = "\nEnhanced description:"

# How the release decodes: greedily, until the tokeniser's end token, which also pads.
GENERATION = {"max_new_tokens": 196, "do_sample": False}

# A colon among the first characters ends a label if one of the words stands before it.
LABEL_WORDS = ("enhanced", "description", "prompt")
LABEL_LENGTH = 40
MAX_CLAUSES = 4
MAX_LENGTH = 256


def enhancement_request(prompt: str) -> str:
    """What the language model continues; one start token goes before it, no system prompt."""
    return _REQUEST + prompt + _ANSWER


def clean_enhancement(prompt: str, text: str) -> str:
    """The enhanced prompt in what the language model wrote.

    The first line that is not empty, without a label such as "Enhanced:"; of its clauses between commas the first four
    that differ whatever their case; at most 256 characters, cut between words.

    Args:
      prompt: the user's, the result where nothing is left.
      text: the decoded new tokens, without special ones.
    """
    text = next((line.strip() for line in text.splitlines() if line.strip()), "")
    label, _, rest = text.partition(":")
    if len(label) < min(len(text), LABEL_LENGTH) and any(word in label.lower() for word in LABEL_WORDS):
        text = rest.strip()
    clauses: dict[str, str] = {}
    for clause in filter(None, map(str.strip, text.split(","))):
        clauses.setdefault(clause.lower(), clause)
    text = ", ".join(list(clauses.values())[:MAX_CLAUSES]) or text  # of commas alone, the commas, as in the release
    if len(text) > MAX_LENGTH:
        text = text[:MAX_LENGTH]
        text = text.rpartition(" ")[0] or text
    return text.strip() or prompt
