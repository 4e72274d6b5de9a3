"""One thread for the whole suite: a second buys small nets nothing, and on a busy machine both wait for each other."""

import torch

torch.set_num_threads(1)
