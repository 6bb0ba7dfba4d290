import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from rvedit_diffusers.training.meter import LossMeter


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_means_over_all_batches_and_by_noise_level(accelerator):
    meter = LossMeter(torch.device("cpu"))
    meter.add(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.6]), None, 1)
    meter.add(torch.tensor([5.0]), torch.tensor([0.2]), None, 1)
    assert meter.read(accelerator, True) == {"flow": 3.0, "flow_sigma_0.00-0.25": 3.0, "flow_sigma_0.50-0.75": 3.0}


def test_the_bound_stands_beside_the_mean_of_the_ceilings(accelerator):
    meter = LossMeter(torch.device("cpu"))
    for num_tokens, align in ((8, 1.0), (32, 2.0)):
        meter.add(torch.ones(2), torch.full((2,), 0.5), torch.full((2,), align), num_tokens)
    entry = meter.read(accelerator, True)
    ceiling = (math.log(8) + math.log(32)) / 2
    assert entry["align"] == 1.5
    assert entry["information_ceiling_nats"] == pytest.approx(ceiling)
    assert entry["information_nats"] == pytest.approx(ceiling - 1.5)


def test_other_losses_bound_no_information(accelerator):
    meter = LossMeter(torch.device("cpu"))
    meter.add(torch.ones(1), torch.ones(1), torch.ones(1), 8)
    assert meter.read(accelerator, False) == {"flow": 1.0, "flow_sigma_0.75-1.00": 1.0, "align": 1.0}


def test_the_loss_by_noise_level_has_the_name_that_it_is_given(accelerator):
    meter = LossMeter(torch.device("cpu"), "connect")
    meter.add(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.6]), None, 1)
    assert meter.read(accelerator, True) == {
        "connect": 2.0,
        "connect_sigma_0.00-0.25": 1.0,
        "connect_sigma_0.50-0.75": 3.0,
    }


def test_what_is_not_finite_does_not_spoil_the_means(accelerator):
    meter = LossMeter(torch.device("cpu"))
    meter.add(torch.tensor([2.0, math.nan]), torch.tensor([0.1, 0.1]), torch.tensor([math.inf, 4.0]), 8)
    entry = meter.read(accelerator, False)
    assert (entry["flow"], entry["align"]) == (2.0, 4.0)


def test_reading_begins_anew(accelerator):
    meter = LossMeter(torch.device("cpu"))
    meter.add(torch.ones(1), torch.zeros(1), None, 1)
    meter.read(accelerator, True)
    assert meter.read(accelerator, True) == {}
