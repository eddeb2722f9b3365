"""Disturbance of what an expert does, so that its demonstrations show how to come back (DART, arXiv 1703.09327).

    n(t) = 0.8 n(t - 1) + sigma (e_x, e_y, e_z, e_rx / 3, e_ry / 3, e_rz / 3),   e standard normal, n(-1) = 0

is added to the six deltas of the arm, in units of an action's range [-1, 1]; in the long run each translation's
standard deviation is sigma / 0.6. The gripper's command is left alone.
"""

import numpy as np

PERSISTENCE = 0.8  # of the last step's noise
SHARES = np.array([1, 1, 1, 1 / 3, 1 / 3, 1 / 3])


class Noise:
    """The noise of one attempt, step after step. With sigma 0 it draws nothing and changes nothing."""

    def __init__(self, sigma: float, rng: np.random.Generator) -> None:
        self.sigma, self.rng = sigma, rng
        self.last = np.zeros(6)

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """An action (7,) float32 in [-1, 1] -> the one to carry out."""
        if not self.sigma:
            return action
        self.last = PERSISTENCE * self.last + self.sigma * SHARES * self.rng.standard_normal(6)
        arm = np.clip(action[:6] + self.last, -1, 1)
        return np.concatenate([arm, action[6:]]).astype(np.float32)
