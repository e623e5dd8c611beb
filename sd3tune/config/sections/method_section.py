"""Fields and properties of every training method."""

from __future__ import annotations

from typing import ClassVar

from sd3tune.config.sections.learned_token import LearnedTokenKeys
from sd3tune.config.sections.section import Section


class MethodSection(Section):
    """Fields shared by all methods, and the properties of a method that other sections need."""

    kind: str
    freezes_base: ClassVar[bool] = True
    """True if the base's weights never change, so that they can be quantised."""
    makes_adapter: ClassVar[bool] = True
    """True if the result is an adapter, False if it is a whole model."""
    fits_packed_base: ClassVar[bool] = True
    """True if it can be trained on weights in 4 bits, which are stored without their rows."""
    reads_base: ClassVar[bool] = False
    """True if it needs the base's weights outside of a forward pass."""

    gives_rates: ClassVar[str] = "method.text_encoders or method.loraplus_lr_ratio give parameters"
    """The keys of `has_rates`, for messages, with their verb."""

    usual_lr: ClassVar[float | None] = None
    """The default of `optimizer.lr` for optimizers whose own is AdamW's; None takes theirs."""

    def fits_base(self, form: str) -> bool:
        """Return True if it can be trained on a base whose blocks are quantised to `form`."""
        return form == "none" or (self.freezes_base and (self.fits_packed_base or form != "nf4"))

    @property
    def fits_swapped_blocks(self) -> bool:
        """True if it can be trained with blocks whose weights wait in system memory."""
        return self.freezes_base and not self.reads_base

    @property
    def draws_in_blocks(self) -> bool:
        """True if training draws random numbers inside the transformer's blocks."""
        return False

    @property
    def has_rates(self) -> bool:
        """True if parameters differ in their learning rates."""
        return False

    @property
    def trains_text(self) -> bool:
        """True if text encoders are trained, so that the text of a later step is not known ahead."""
        return False

    @property
    def learned_token(self) -> LearnedTokenKeys | None:
        """The keys of the token that is trained; None without one."""
        return None

    @property
    def depends_on_length(self) -> bool:
        """True if steps depend on the number of steps of the run, so that a finished run cannot be extended."""
        return False
