"""What NDIF 0.1.2 needs to run without a GPU, beside nnsight 0.8.1, and as a server that knows nothing of this library.

Imported by NDIF's processes alone, by the names in NDIF_MODEL_IMPORT_PATH and NDIF_CONTROLLER_IMPORT_PATH.
"""

import sys

import ray
import torch

if not torch.cuda.is_available():
    torch.cuda.synchronize = lambda *args, **kwargs: None  # NDIF's actor calls it on any machine

from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.modeling.mixins.remotable import Remotable


class _Unknown:
    """Lets no one import what a real server has not: a request that leans on it must fail here too."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sae_lab", "jaxtyping", "beartype"):
            raise ModuleNotFoundError(f"No module named {name!r} on this server", name=name)


class _OnCPU(BaseModelDeployment):
    CACHEABLE = False  # it would be parked by moving its weights from a GPU

    def load_from_disk(self):
        sys.meta_path.insert(0, _Unknown())
        options = {name: value for name, value in self.kwargs.items() if name != "trust_remote_code" or value}
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **options
        )
        model._module.requires_grad_(False)
        return model


@ray.remote(num_cpus=1, max_restarts=-1)
class ModelOnCPU(_OnCPU):
    pass


@ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})
class Controller(_ControllerActor):
    def __init__(self, **kwargs):
        for name in ("describe_checkpoint", "max_tp_size"):
            _without(name, "trust_remote_code")
        super().__init__(**kwargs)


def _without(name, option):
    """NDIF passes an option that nnsight 0.8.1 no longer takes."""
    original = getattr(Remotable, name).__func__

    def method(cls, *args, **kwargs):
        kwargs.pop(option, None)
        return original(cls, *args, **kwargs)

    setattr(Remotable, name, classmethod(method))
