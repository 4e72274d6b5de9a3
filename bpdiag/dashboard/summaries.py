"""The summaries that TensorBoard's own plugins read, made without TensorFlow: text, images, histograms, hparams."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.histogram import metadata as histograms
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.text import metadata as text_plugin


def text(tag: str, markdown: str) -> Summary:
    """Markdown for the text tab."""
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=text_plugin.PLUGIN_NAME))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()], tensor_shape=shape)
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])


def image(tag: str, png: bytes) -> Summary:
    """A PNG for the images tab."""
    width, height = struct.unpack(">II", png[16:24])  # where the format has them
    picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=picture)])


def histogram(tag: str, low: float, high: float, counts: Sequence[float]) -> Summary.Value:
    """Equal bins from ``low`` to ``high`` for the histograms tab; equal numbers make one bin, one wide."""
    if low == high:
        low, high, counts = low - 0.5, high + 0.5, [sum(counts)]
    shares = [i / len(counts) for i in range(len(counts) + 1)]
    edges = [low * (1 - share) + high * share for share in shares]  # high - low may overflow
    told = [x for i, count in enumerate(counts) for x in (edges[i], edges[i + 1], count)]
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(counts)), TensorShapeProto.Dim(size=3)])
    tensor = TensorProto(dtype=DT_DOUBLE, double_val=told, tensor_shape=shape)
    return Summary.Value(tag=tag, metadata=histograms.create_summary_metadata(None, None), tensor=tensor)


def settings(config: Mapping[str, Any], results: Sequence[str]) -> list[Summary]:
    """A run's configuration and the tags of its results for the hparams tab, in the run's own file.

    Args:
        config: dotted key -> number, word or truth value; anything else is told as text.
        results: scalar tags that the table shows as columns.
    """
    infos, values = [], {}
    told: dict[str, Any]
    for key, value in config.items():
        if isinstance(value, bool):
            kind, told = api_pb2.DATA_TYPE_BOOL, {"bool_value": value}
        elif isinstance(value, int | float):
            kind, told = api_pb2.DATA_TYPE_FLOAT64, {"number_value": float(value)}
        else:
            kind, told = api_pb2.DATA_TYPE_STRING, {"string_value": str(value)}
        infos.append(api_pb2.HParamInfo(name=key, type=kind))
        values[key] = told
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in results]
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics)
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for key, told in values.items():
        for field, value in told.items():
            setattr(start.hparams[key], field, value)
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return [
        _settings(hparams.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=experiment)),
        _settings(hparams.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=start)),
        _settings(hparams.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=end)),
    ]


def _settings(tag: str, data: plugin_data_pb2.HParamsPluginData) -> Summary:
    metadata = hparams.create_summary_metadata(data)
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=hparams.NULL_TENSOR)])


def layout(charts: Mapping[str, str]) -> Summary:
    """The custom scalars tab: all layers of a statistic in one chart.

    Args:
        charts: group/statistic, the beginning of the tags -> what it shows.
    """
    groups: dict[str, list[layout_pb2.Chart]] = {}
    for tag, title in charts.items():
        lines = layout_pb2.MultilineChartContent(tag=[rf"^{tag}/"])
        groups.setdefault(tag.partition("/")[0], []).append(layout_pb2.Chart(title=title, multiline=lines))
    categories = [layout_pb2.Category(title=group, chart=charts) for group, charts in groups.items()]
    content = layout_pb2.Layout(category=categories).SerializeToString()
    tensor = TensorProto(dtype=DT_STRING, string_val=[content], tensor_shape=TensorShapeProto())
    metadata = custom_scalar.create_summary_metadata()
    return Summary(value=[Summary.Value(tag=custom_scalar.CONFIG_SUMMARY_TAG, metadata=metadata, tensor=tensor)])
