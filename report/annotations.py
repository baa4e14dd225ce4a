"""Predictions as COCO annotations, which labelling tools import, so that people correct them instead of drawing."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from core.files import atomic_write
from dataset.annotations.regions import find_regions, polygon_of
from dataset.legend import Legend
from engine.distributed import all_gather, on_main
from report.arrays import label_array


class CocoWriter:
    """Collects predictions and writes them as a COCO instances file.

    Every connected region of a class is an annotation. The masks that pycocotools draws from the file are the predicted
    ones. Category ids are class ids.

    Args:
        legend: names of the labels.
        file_names: image id -> file name of its photograph, in the order of the file.
        polygons: outlines are polygons along the borders of pixels; otherwise run lengths.
    """

    def __init__(self, legend: Legend, file_names: Mapping[str, str], polygons: bool = False):
        self.legend, self.file_names, self.polygons = legend, file_names, polygons
        self._images = {}  # image id -> shape and annotations without numbers

    def __call__(self, image_id: str, prediction: torch.Tensor, truth: torch.Tensor):
        """Take one image's labels, integer [H, W]; the truth is not used."""
        labels = label_array(prediction)
        self._images[image_id] = (
            labels.shape,
            [self._annotation(region, labels.shape) for region in find_regions(labels)],
        )

    def _annotation(self, region, shape):
        runs = {'size': list(shape), 'counts': region.counts.tolist()}
        return {
            'category_id': int(self.legend.class_ids[region.label]), 'iscrowd': 0, 'bbox': list(region.box),
            'area': region.area, 'segmentation': [polygon_of(region)] if self.polygons else runs,
        }  # fmt: skip

    def write(self, path: Path):
        """Write the file with the images of all processes; to be called by all."""
        segmented = {image_id: image for share in all_gather(self._images) for image_id, image in share.items()}
        on_main(lambda: self._write(path, segmented))

    def _write(self, path, segmented):
        images, annotations = [], []
        for number, (image_id, file_name) in enumerate(self.file_names.items(), 1):
            if image_id in segmented:
                (height, width), of_image = segmented[image_id]
                images.append({'id': number, 'file_name': file_name, 'height': height, 'width': width})
                annotations += [{'image_id': number, **annotation} for annotation in of_image]
        content = {
            'images': images,
            'categories': [{'id': int(class_id), 'name': name} for class_id, name in self.legend.classes],
            'annotations': [{'id': number, **annotation} for number, annotation in enumerate(annotations, 1)],
        }
        with atomic_write(path) as file:
            json.dump(content, file)
