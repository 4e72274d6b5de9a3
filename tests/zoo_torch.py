"""The zoo's torch and torchvision architectures: of full depth where they are small, else the same class, shallow."""

from __future__ import annotations

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn, ssdlite320_mobilenet_v3_large
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.googlenet import GoogLeNet
from torchvision.models.optical_flow import raft_small
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, lraspp_mobilenet_v3_large
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2
from torchvision.models.video import r3d_18
from torchvision.models.video.mvit import MSBlockConfig, MViT
from zoo_suite import Entry, told_loss

CLASSES = 4


def images(size: int = 32, batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, 3, size, size),)


def sequences(length: int = 5, width: int = 8, batch: int = 3) -> tuple[Tensor]:
    return (torch.randn(length, batch, width),)


class Attention(nn.Module):
    """Multi-head attention of a sequence with itself, its weights given out too."""

    def __init__(self, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, dropout=0.1, **options)

    def forward(self, x):
        return self.inner(x, x, x)


class Cells(nn.Module):
    """Two cells, step by step: each is called as often as the sequence is long."""

    def __init__(self):
        super().__init__()
        self.low, self.high, self.head = nn.LSTMCell(8, 6), nn.GRUCell(6, 5), nn.Linear(5, CLASSES)

    def forward(self, sequence):
        low, high = None, None
        for x in sequence:
            low = self.low(x, low)
            high = self.high(low[0], high)
        return self.head(high)


TORCH = {
    "Transformer": Entry(
        lambda: nn.Transformer(16, 2, 2, 2, 32, batch_first=True), lambda: (*sequences(3, 16, 5), *sequences(3, 16, 4))
    ),
    "TransformerEncoder, norm first": Entry(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", norm_first=True), 2, enable_nested_tensor=False
        ),
        lambda: sequences(5, 16),
    ),
    "LSTM": Entry(lambda: nn.LSTM(8, 6, 2, dropout=0.2, bidirectional=True), sequences),
    "LSTM with projection": Entry(lambda: nn.LSTM(8, 6, proj_size=3), sequences),
    "GRU": Entry(lambda: nn.GRU(8, 6, 2, dropout=0.2), sequences),
    "RNN": Entry(lambda: nn.RNN(8, 6, nonlinearity="relu"), sequences),
    "LSTMCell, GRUCell": Entry(Cells, sequences, remark="each called five times"),
    "MultiheadAttention": Entry(Attention, sequences),
    "MultiheadAttention, other keys": Entry(
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5, bias=False, add_zero_attn=True),
        lambda: (*sequences(), *sequences(4, 6), *sequences(4, 5)),
    ),
}

boxes = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 40.0], [10.0, 8.0, 60.0, 50.0]]), "labels": torch.tensor([1, 2])}


def scenes(size: int = 64) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return [torch.rand(3, size, size) for _ in range(2)], [boxes, boxes]


def flow_inputs() -> dict[str, Tensor]:
    return {"image1": torch.rand(1, 3, 128, 128), "image2": torch.rand(1, 3, 128, 128), "num_flow_updates": 3}


KERNELS = [3, 3, 3], [3, 3, 3]

TORCHVISION = {
    "resnet18": Entry(lambda: tv.resnet18(num_classes=CLASSES), images, remark="in place; a module called twice"),
    "wide bottleneck ResNet": Entry(
        lambda: tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], CLASSES, True, groups=4, width_per_group=8), images
    ),
    "alexnet": Entry(lambda: tv.alexnet(num_classes=CLASSES), lambda: images(64), dtype=torch.float32),
    "squeezenet1_1": Entry(lambda: tv.squeezenet1_1(num_classes=CLASSES), images),
    "densenet": Entry(
        lambda: tv.DenseNet(8, (2, 3, 2), 16, bn_size=2, drop_rate=0.2, num_classes=CLASSES), images, remark="concat"
    ),
    "googlenet": Entry(
        lambda: GoogLeNet(CLASSES, init_weights=False), lambda: images(64), remark="two auxiliary heads"
    ),
    "inception_v3": Entry(
        lambda: tv.Inception3(CLASSES, aux_logits=False, init_weights=False), lambda: images(80), dtype=torch.float32
    ),
    "mobilenet_v2": Entry(lambda: tv.mobilenet_v2(num_classes=CLASSES), images),
    "mobilenet_v3_small": Entry(lambda: tv.mobilenet_v3_small(num_classes=CLASSES), images, remark="in place"),
    "mnasnet0_5": Entry(lambda: tv.mnasnet0_5(num_classes=CLASSES), images),
    "shufflenet_v2_x0_5": Entry(lambda: tv.shufflenet_v2_x0_5(num_classes=CLASSES), images),
    "efficientnet_b0": Entry(lambda: tv.efficientnet_b0(num_classes=CLASSES), images, remark="stochastic depth"),
    "efficientnet_v2": Entry(
        lambda: EfficientNet(
            [FusedMBConvConfig(4, 3, 2, 8, 8, 2), MBConvConfig(4, 3, 2, 8, 12, 2)], 0.2, 0.2, CLASSES
        ),
        images,
    ),
    "regnet_y_400mf": Entry(lambda: tv.regnet_y_400mf(num_classes=CLASSES), images),
    "convnext": Entry(
        lambda: ConvNeXt([CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 2)], 0.2, num_classes=CLASSES), images
    ),
    "vit": Entry(
        lambda: tv.VisionTransformer(32, 8, 2, 2, 16, 32, dropout=0.1, num_classes=CLASSES),
        images,
        remark="parameters of its own",
    ),
    "swin": Entry(lambda: SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES), images),
    "swin_v2": Entry(
        lambda: SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES, block=SwinTransformerBlockV2),
        images,
    ),
    "maxvit": Entry(
        lambda: tv.MaxVit((64, 64), 8, 4, [8, 16], [1, 1], 4, 0.2, num_classes=CLASSES), lambda: images(64)
    ),
    "mvit": Entry(
        lambda: MViT(
            (16, 16),
            4,
            [
                MSBlockConfig(1, 16, 32, *KERNELS, [1, 2, 2], [1, 1, 1]),
                MSBlockConfig(2, 32, 32, *KERNELS, [1, 1, 1], [1, 2, 2]),
            ],
            residual_pool=True,
            residual_with_cls_embed=False,
            rel_pos_embed=True,
            proj_after_attn=True,
            stochastic_depth_prob=0.1,
            num_classes=CLASSES,
        ),
        lambda: (torch.randn(2, 3, 4, 16, 16),),
    ),
    "r3d_18": Entry(lambda: r3d_18(num_classes=CLASSES), lambda: (torch.randn(2, 3, 4, 16, 16),)),
    "deeplabv3_mobilenet_v3_large": Entry(
        lambda: deeplabv3_mobilenet_v3_large(weights_backbone=None, num_classes=CLASSES, aux_loss=True),
        lambda: images(64),
        remark="a mapping given out",
    ),
    "lraspp_mobilenet_v3_large": Entry(
        lambda: lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=CLASSES), lambda: images(64)
    ),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Entry(
        lambda: fasterrcnn_mobilenet_v3_large_320_fpn(
            weights_backbone=None, num_classes=CLASSES, min_size=96, max_size=96, rpn_pre_nms_top_n_train=50,
            rpn_post_nms_top_n_train=20,
        ),
        scenes,
        told_loss,
        remark="losses given out; modules called per level",
    ),
    "ssdlite320_mobilenet_v3_large": Entry(
        lambda: ssdlite320_mobilenet_v3_large(weights_backbone=None, num_classes=CLASSES), scenes, told_loss
    ),
    "raft_small": Entry(raft_small, flow_inputs, dtype=torch.float32, remark="an update block called three times"),
}  # fmt: skip
