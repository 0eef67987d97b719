"""Hidden units taken out of a linear map in closed form, and how many of them where several maps share a budget.

With h the hidden units and y = W h + b, taking some out and fitting the others anew has a closed form in the second
moments of h: Optimal Brain Surgeon (Hassibi and Stork, 1993), layer by layer (Dong et al., 2017), here for whole
columns of W. With A = E[(h - E h)(h - E h)ᵀ] and P = A⁻¹, without the units R

    W ← W - W_R (P_RR)⁻¹ P_R      at the cost of      tr(W_R (P_RR)⁻¹ W_Rᵀ)
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .moments import Moments

# Units are taken out in groups, the cheapest first, so that widths stay what hardware likes; twice as many at once from
# twice as many units on, and so forth.
GROUP, FEW = 8, 1536
# Added to each variance, as a fraction of the mean one: where removals are weighed, and where W is fitted to the
# teacher, anchored at the pretrained weights.
DAMPING, ANCHOR = 1e-2, 10.0
# The matrices are made smaller where fewer than this share of their units is left.
LEAN = 0.9


class Removal:
    """Units being taken out of a linear map, whose output is first fitted to a target.

    Args:
        moments: Of the hidden units h (n, H), and of what y (n, D) lacks.
        linear: The map.
        scale: By how much each channel of y counts (D,).
    """

    def __init__(self, moments: Moments, linear: nn.Linear, scale: Tensor) -> None:
        count, weight = moments.target.count, linear.weight.double()
        self.scale, self.width = scale.double()[:, None], linear.in_features
        self.group = GROUP * max(1, self.width // FEW)
        self.mean = moments.mean_x if linear.bias is not None else torch.zeros_like(moments.mean_x)
        target = moments.target.mean if linear.bias is not None else torch.zeros_like(moments.target.mean)
        second = moments.xx / count - torch.outer(self.mean, self.mean)
        lacking = moments.xy / count - torch.outer(self.mean, target)
        unit = second.diagonal().mean() * torch.eye(self.width, dtype=second.dtype, device=second.device)
        self.weight = weight + torch.linalg.solve(second + ANCHOR * unit, lacking).T
        bias = 0 if linear.bias is None else linear.bias.double()
        self.output = weight @ self.mean + bias + target  # the mean of y, which removals do not change
        self.inverse = torch.linalg.inv(second + DAMPING * unit)
        self.numbers = torch.arange(self.width, device=second.device)  # of the units that are still in the matrices
        self.stays = torch.ones_like(self.numbers, dtype=torch.bool)
        self.left = self.width

    @property
    def kept(self) -> Tensor:
        """The units that are left, by their numbers."""
        return self.numbers[self.stays]

    def step(self) -> float:
        """Take the cheapest group out; the squared error of y that this adds, each channel as it counts."""
        if self.left < LEAN * len(self.numbers):
            self._lean()
        scaled = self.weight * self.scale
        costs = scaled.square().sum(dim=0) / self.inverse.diagonal()
        out = costs.masked_fill(~self.stays, torch.inf).argsort()[: min(self.group, self.left - GROUP)]
        towards, within = self.inverse[out], self.inverse[out][:, out]
        cost = float((scaled[:, out].T * torch.linalg.solve(within, scaled[:, out].T)).sum())
        change = torch.linalg.solve(within, towards)
        self.weight -= self.weight[:, out] @ change
        self.inverse.addmm_(towards.T, change, alpha=-1)
        self.stays[out], self.left = False, self.left - len(out)
        self.weight[:, out] = 0
        self.inverse[out] = 0
        self.inverse[:, out] = 0
        self.inverse[out, out] = 1
        return cost

    def _lean(self) -> None:
        """Leave units that are out out of the matrices: whatever remains is done on smaller ones."""
        self.weight, self.inverse = self.weight[:, self.stays], self.inverse[self.stays][:, self.stays]
        self.numbers = self.kept
        self.stays = torch.ones_like(self.numbers, dtype=torch.bool)

    def steps(self) -> list[tuple[int, float]]:
        """Take all out but the last group; the units left after each step, and what it cost."""
        found = []
        while self.left > GROUP:
            cost = self.step()
            found.append((self.left, cost))
        return found

    def down_to(self, width: int) -> None:
        """Take units out until so many are left, which `steps` names."""
        while self.left > width:
            self.step()

    def write(self, linear: nn.Linear) -> None:
        """Write what is left into a map of the units that are left."""
        weight = self.weight[:, self.stays]
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.copy_(self.output - weight @ self.mean[self.kept])


@dataclass(frozen=True)
class Weighed:
    """What it costs to take units out of a map.

    Args:
        width: The units that it has.
        price: What each takes, in MACs or what is proportional to them.
        steps: After each step, the units left, and the error that it adds.
    """

    width: int
    price: float
    steps: Sequence[tuple[int, float]]

    def candidate(self, number: int) -> tuple[float, float]:
        """What a step costs for what it saves, and what it saves."""
        before = self.width if number == 0 else self.steps[number - 1][0]
        left, error = self.steps[number]
        saved = (before - left) * self.price
        return error / saved, saved


def widths_within(weighed: Mapping[int, Weighed], keep: float) -> dict[int, int]:
    """How many units to leave to each of some maps, where a share of the price of all may stay.

    The steps are taken that cost least for what they save, each after those before it.
    """
    widths = {key: one.width for key, one in weighed.items()}
    saving = (1 - keep) * sum(one.price * one.width for one in weighed.values())
    queue = [(*one.candidate(0), key, 0) for key, one in weighed.items() if one.steps]
    heapq.heapify(queue)
    while queue and saving > 0:
        _, saved, key, number = heapq.heappop(queue)
        widths[key] = weighed[key].steps[number][0]
        saving -= saved
        if number + 1 < len(weighed[key].steps):
            heapq.heappush(queue, (*weighed[key].candidate(number + 1), key, number + 1))
    return widths
