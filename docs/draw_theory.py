"""Draws docs/theory.svg: how far exact self-play iterations are from the data, for several beta.

python docs/draw_theory.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from spvla.train.losses import optimum

DATA = torch.tensor([0.40, 0.25, 0.15, 0.10, 0.07, 0.03], dtype=torch.float64)
START = torch.tensor([0.10, 0.15, 0.30, 0.05, 0.25, 0.15], dtype=torch.float64)
BETAS, ITERATIONS = (0.3, 0.45, 0.7, 1.0, 3.0), 7


def distances(beta: float) -> list[float]:
    """Total variation between each iterate and the data."""
    policy, found = START, []
    for _ in range(ITERATIONS + 1):
        found.append(0.5 * (policy - DATA).abs().sum().item())
        policy = optimum(policy, DATA, beta)
    return found


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "spvla"  # the same bytes every time
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for beta in BETAS:
        left.plot(distances(beta), marker="o", markersize=3, label=f"β = {beta:g}")
    left.set(xlabel="iteration", ylabel="total variation to the data", ylim=(0, 1))
    left.legend(frameon=False, fontsize=8, loc=(0.75, 0.12))
    width = 0.16
    bars = {"data": DATA, "opponent": START} | {f"β = {b:g}": optimum(START, DATA, b) for b in (0.3, 0.7, 3.0)}
    for i, (label, p) in enumerate(bars.items()):
        right.bar([x + (i - 2) * width for x in range(len(DATA))], p, width, label=label)
    right.set(xlabel="action", ylabel="probability after one iteration")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("theory.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
