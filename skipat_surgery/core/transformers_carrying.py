"""What a tower of transformers needs on top of `layers`, where its own code makes a new tensor between two blocks."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from .carrying import carried_or_none, carry
from .grafting import Grafted


class AddingEncoder(Grafted):
    """YOLOS' encoder, which adds position embeddings between its blocks: the sum carries what the block's output did.

    Source: transformers, ``YolosEncoder.forward``, whose loop this is.
    """

    layer: nn.ModuleList
    interpolation: nn.Module

    def forward(self, hidden_states: Tensor, height: int, width: int) -> BaseModelOutput:
        between = self.interpolation((height, width))
        last = len(self.layer) - 1
        for index, block in enumerate(self.layer):
            hidden_states = block(hidden_states)
            if index < last:
                state = carried_or_none(hidden_states)
                hidden_states = hidden_states + between[index].to(hidden_states.device)
                if state is not None:
                    carry(hidden_states, *state)
        return BaseModelOutput(last_hidden_state=hidden_states)
