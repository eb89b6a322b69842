"""One engine over several devices: tensor parallelism (Megatron-LM; Shoeybi et al., 2019), an option of execution.

`split`: what a rank holds of a model. `decoder`: where the parts meet. `ranks`: the collectives. `messages`: a step's
plan on its way to the other ranks. `runner`: rank 0 leads, the others follow. `start`: the processes.
"""
