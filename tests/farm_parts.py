"""What several of the farm's tests stand on."""

from spvla.farm.protocol import Protocol

PROTOCOL = Protocol(
    assets="primitives",
    assets_digest="a1",
    renderer="llvmpipe",
    mujoco="3.8.1",
    robosuite="1.4.0",
    libero="0.1.4",
    num_steps_wait=10,
    center_crop=True,
    seed=7,
    device="cpu",
    dtype="float32",
    decode_batch_size=4,
)
