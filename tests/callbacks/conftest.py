import pytest
from scheduled import LearnedQuantizer

from lightning_qat import QuantScheme, TensorSpec
from lightning_qat.quantizers import quantizers


@pytest.fixture
def learned_scheme():
    """Weights and inputs with learned gains."""
    quantizers.add("learned-in-schedules", LearnedQuantizer)
    yield QuantScheme(
        weight=TensorSpec(bits=4, quantizer="learned-in-schedules"),
        input=TensorSpec(bits=8, quantizer="learned-in-schedules", granularity="token"),
    )
    del quantizers._entries["learned-in-schedules"]
