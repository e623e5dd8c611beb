"""The section on limits: known limits, common mistakes, and untested properties."""

from __future__ import annotations

from collections.abc import Iterator

from sd3tune.model.base.contract import spread_without_offset
from sd3tune.publish.card.markdown import code
from sd3tune.publish.card.trained import Trained


def limits_section(trained: Trained) -> str:
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in _limits(trained))


def _limits(trained: Trained) -> Iterator[str]:
    contract = trained.contract
    yield from _noise(trained)
    yield _data(trained)
    yield _text_length(trained)
    yield from _noise_offset(trained)
    if trained.is_adapter:
        yield (
            f"It only fits models of the shape of {code(contract['base'])}: other sizes of Stable Diffusion 3 do not "
            "load it. On other weights of that shape, such as fine-tunes, it was not tried."
        )
    yield _prior(trained)
    yield _unmeasured(trained)


def _noise(trained: Trained) -> Iterator[str]:
    if trained.contract["base_kind"] == "tiny" and not trained.from_scratch:
        yield f"{code(trained.contract['base'])} has random weights, so this draws noise: it is a rehearsal."


def _data(trained: Trained) -> str:
    images, side = trained.run_facts.get("images"), trained.contract["resolution"]
    smallest = min(trained.contract.get("resolutions", [side]))
    sides = f"{side} px" if smallest == side else f"{smallest} to {side} px"
    learned = "what it was trained on" if images is None else f"{images} image{'s' * (images != 1)}"
    return f"It was trained on {learned} at {sides}, and works best for similar pictures of about that size."


def _text_length(trained: Trained) -> str:
    """Return the limit on T5 length, a part of the conditioning, as the transformer attends to padding."""
    length, lengths = trained.contract["max_sequence_length"], trained.t5_lengths
    argument = f"`max_sequence_length={length}`"
    if not trained.uses_t5:
        return (
            "T5 was left out: with it, the pictures differ from those of training. "
            f"{length} zero vectors take its place: diffusers needs {argument} for that, `sd3tune infer` adds them by "
            "itself, and ComfyUI leaves them out."
        )
    several = f"s {', '.join(map(str, lengths))}, each in an equal share of the steps"
    return (
        f"It was trained at T5 length{several if len(lengths) > 1 else f' {length}'}. Stable Diffusion 3 attends to "
        f"padding, so a prompt padded to another length is another prompt. `sd3tune infer` pads to {length}. diffusers "
        f"pads to 256; {argument} sets it. ComfyUI pads to 77 and cuts nothing off; its node `T5TokenizerOptions`, "
        f"between the CLIP loader and both prompts, sets it: `min_length` {length}."
    )


def _noise_offset(trained: Trained) -> Iterator[str]:
    """Yield the limit on noise offset, which other tools ignore; the diffusers snippet adds it."""
    strength, side = trained.contract.get("sampler_noise_offset", 0.0), trained.contract["resolution"]
    if strength:
        share = 100 * spread_without_offset(strength, side)
        yield (
            f"It was trained with noise offset {strength:g}, and sampling must start from it. `sd3tune infer` does "
            "that by itself, and so does the code for diffusers above. Other tools start without it: then "
            f"{share:.2g} % of the trained spread of brightness is drawn at {side} px, and bright and dark pictures "
            "come out alike."
        )


def _prior(trained: Trained) -> str:
    if any(source.prior and source.prior.weight > 0 for source in trained.config.data.sources):
        return "Prior preservation was used, to keep the rest of the class unchanged; its effect was not measured."
    return "Prior preservation was not used, so other members of the subject's class may look like the subject."


def _unmeasured(trained: Trained) -> str:
    measured = trained.report is not None and trained.report.get("held_out")
    held_out = "" if measured else ", nor the held-out loss"
    return f"Not measured: likeness, prompt adherence, and image quality{held_out}."
