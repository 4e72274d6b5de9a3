"""Models to be swapped: a loss each, and its inputs, in float64."""

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

CLASSES = 10


class Lossy(nn.Module):
    """A classifier and its loss, in one forward."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y):
        return F.cross_entropy(self.net(x), y)


class Sequence(nn.Module):
    """The last step's state, or the last token, classified."""

    def __init__(self, core, width):
        super().__init__()
        self.core, self.head = core, nn.Linear(width, CLASSES)

    def forward(self, x):
        y = self.core(x)
        return self.head((y[0] if isinstance(y, tuple) else y)[:, -1])


class Attended(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **settings)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Block(nn.Module):
    """Of a causal transformer, all but its weights by torch.nn.functional."""

    def __init__(self, width, heads, p):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.p = heads, p

    def forward(self, x):
        B, T, D = x.shape
        p = self.p if self.training else 0.0
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(D, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(B, T, D)), self.p, self.training)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 16), nn.Parameter(0.1 * torch.randn(12, 16))
        self.blocks, self.head = nn.ModuleList([Block(16, 4, p) for _ in range(2)]), nn.Linear(16, 11)

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.places
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).transpose(1, 2), targets)


def pictures(net):
    return Lossy(net), (torch.randn(4, 3, 32, 32), torch.arange(4))


def sequences(core, width, n_in=16):
    return Lossy(Sequence(core, width)), (torch.randn(4, 6, n_in), torch.arange(4))


def encoder(p=0.0):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, p, batch_first=True), 2)


def tokens(p=0.0):
    return Gpt(p), (torch.randint(11, (3, 12)), torch.randint(11, (3, 12)))


def convnext():
    block = torchvision.models.convnext.CNBlockConfig
    settings = [block(8, 16, 1), block(16, None, 1)]
    return torchvision.models.ConvNeXt(settings, stochastic_depth_prob=0.2, num_classes=CLASSES)


def vit(p=0.0):
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 16, 32, dropout=p, num_classes=CLASSES)


MODELS = {
    "resnet18": lambda: pictures(torchvision.models.resnet18(num_classes=CLASSES)),
    "vit": lambda: pictures(vit()),
    "vit, dropout": lambda: pictures(vit(0.1)),
    "convnext": lambda: pictures(convnext()),
    "gpt": tokens,
    "gpt, dropout": lambda: tokens(0.1),
    "encoder": lambda: sequences(encoder(), 16),
    "encoder, dropout": lambda: sequences(encoder(0.1), 16),
    "multi-head attention": lambda: sequences(Attended(), 16),
    "multi-head attention, dropout, more keys": lambda: sequences(Attended(dropout=0.1, add_bias_kv=True), 16),
    "lstm": lambda: sequences(nn.LSTM(16, 16, batch_first=True), 16),
    "lstm, deep, both ways, dropout": lambda: sequences(
        nn.LSTM(16, 8, 3, batch_first=True, bidirectional=True, dropout=0.2), 16
    ),
    "gru": lambda: sequences(nn.GRU(16, 16, batch_first=True), 16),
    "gru, deep": lambda: sequences(nn.GRU(16, 16, 2, batch_first=True, bias=False), 16),
    "rnn": lambda: sequences(nn.RNN(16, 16, batch_first=True), 16),
}


def model(name):
    """One of them and its inputs, the same each time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        return MODELS[name]()
    finally:
        torch.set_default_dtype(before)


def losses(net, inputs, steps=10, call=None, lr=0.05):
    """Of so many SGD steps; the same random numbers each time."""
    torch.manual_seed(1)
    optimizer, told = torch.optim.SGD(net.parameters(), lr), []
    for _ in range(steps):
        loss = (net if call is None else call)(*inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told.append(loss.item())
    return told
