"""Our backbones inside the libraries that people segment and detect with: the real ones, forward and backward."""

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import effvit_zoo

assert effvit_zoo.list_models()  # imported for its names in timm's registry
BACKBONES = [
    "effzoo_conv2former_n",
    "effzoo_edgenext_xx_small",
    "effzoo_efficientvit_b0",
    "effzoo_swiftformer_xs",
    "effzoo_swin_tiny_patch4_window7_224",
]


def features(name, **kwargs):
    sized = {"img_size": (64, 96)} if "swin" in name else {}
    return timm.create_model(name, features_only=True, **sized, **kwargs)


@pytest.mark.parametrize("name", BACKBONES)
def test_segmentation_models_pytorch(name):
    sized = {"img_size": (64, 96)} if "swin" in name else {}
    model = smp.Unet(f"tu-{name}", encoder_weights=None, classes=3, encoder_depth=5, **sized)
    masks = model(torch.randn(2, 3, 64, 96))
    assert masks.shape == (2, 3, 64, 96)
    masks.square().mean().backward()
    for key, parameter in model.encoder.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


class Pyramid(nn.Module):
    """Feature pyramid over a backbone's four stages, as torchvision's detectors take it."""

    def __init__(self, name):
        super().__init__()
        self.body = features(name, out_indices=(0, 1, 2, 3))
        self.channels_last = getattr(self.body, "output_fmt", None) is not None and "swin" in name
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 32)
        self.out_channels = 32

    def forward(self, x):
        maps = self.body(x)
        if self.channels_last:
            maps = [y.permute(0, 3, 1, 2) for y in maps]
        return self.fpn({str(i): y for i, y in enumerate(maps)})


@pytest.mark.parametrize("name", BACKBONES)
def test_faster_rcnn(name):
    torch.manual_seed(0)
    anchors = AnchorGenerator(sizes=((16,), (32,), (48,), (64,)), aspect_ratios=((1.0,),) * 4)
    detector = FasterRCNN(Pyramid(name), num_classes=3, rpn_anchor_generator=anchors, min_size=64, max_size=96)
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}]
    losses = detector([torch.rand(3, 64, 96)], targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.backbone.fpn.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in detector.backbone.body.parameters())
    found = detector.eval()([torch.rand(3, 64, 96)])
    assert {"boxes", "labels", "scores"} <= found[0].keys()
