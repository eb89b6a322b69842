"""One engine over several devices: tensor parallelism (Megatron-LM; Shoeybi et al., 2019), an option of execution.

`split`: what a rank holds. `decoder`: where the parts meet. `ranks`: collectives. `runner`: plans. `start`: processes.
"""
