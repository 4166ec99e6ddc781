"""A small random Mask2Former and CLIP as transformers saves them, for GenEval's reward. Needs torch."""

import pathlib

import stored_models
import torch
import transformers

from tpgrpo_jax.data import geneval

# As coco-detection-mmdet-id2label.json: COCO's order, with VOC's words for some.
OTHER_WORDS = {
  "motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant",
  "dining table": "diningtable", "tv": "tvmonitor", "computer mouse": "mouse", "tv remote": "remote",
  "computer keyboard": "keyboard",
}  # fmt: skip
MASKS = "model.transformer_module.decoder.mask_predictor.mask_embedder.2.0.weight"
LABELS = {i: OTHER_WORDS.get(name, name) for i, name in enumerate(geneval.CLASSES)}


def write_detector(folder, *, size=384, seed=0):
  """The folder of a Mask2Former of 0.1 M parameters that is sure of what it sees, whatever that is."""
  folder = pathlib.Path(folder)
  torch.manual_seed(seed)
  backbone = transformers.SwinConfig(
    embed_dim=8,
    depths=(1, 1, 1, 1),
    num_heads=(1, 1, 2, 2),
    window_size=4,
    image_size=64,
    out_features=["stage1", "stage2", "stage3", "stage4"],
  )
  config = transformers.Mask2FormerConfig(
    backbone_config=backbone,
    feature_size=32,
    mask_feature_size=32,
    hidden_dim=32,
    encoder_feedforward_dim=16,
    encoder_layers=1,
    decoder_layers=2,
    num_attention_heads=2,
    dim_feedforward=16,
    num_queries=12,
    id2label=LABELS,
    label2id={name: i for i, name in LABELS.items()},
  )
  model = transformers.Mask2FormerForUniversalSegmentation(config)
  with torch.no_grad():
    model.class_predictor.weight.mul_(40)
    # Masks that depend on the picture, with logits of the size that trained ones have.
    dict(model.named_parameters())[MASKS].mul_(40)
  model.save_pretrained(folder)
  transformers.Mask2FormerImageProcessorPil(
    size={"height": size, "width": size}, num_labels=80
  ).save_pretrained(folder)
  return folder


def write_classifier(folder):
  """The folder of a CLIP as the hub has it, with its tokenizer, to which pictures look unlike each other."""
  folder = stored_models.write_folder(stored_models.load(), "clip_l", folder)
  model = transformers.CLIPModel.from_pretrained(folder)
  side = model.config.vision_config.image_size
  with torch.no_grad():
    # What all pictures have in common, which random weights see most of, is taken out.
    plain = torch.linspace(-2, 2, 12)[:, None, None, None].expand(12, 3, side, side)
    mean = model.vision_model(plain).pooler_output.mean(0)
    weight = model.visual_projection.weight
    weight -= (weight @ mean)[:, None] * mean / mean.square().sum()
  model.save_pretrained(folder)
  return folder
