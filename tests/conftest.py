"""One thread for the whole suite: a second buys small nets nothing, and on a busy machine both wait for each other."""

import pytest
import torch

torch.set_num_threads(1)
pytest.register_assert_rewrite("rule_suite")  # so that its checks say what they compared, as tests do
