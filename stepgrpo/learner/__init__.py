"""The learner: micro-batches, the loss, the ZeRO-3 engine and the Ray worker around them."""
