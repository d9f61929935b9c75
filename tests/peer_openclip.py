"""What open_clip computes, for tests/test_interop.py: run by .venv-peers, which has open_clip, as a process of its own.

`create NAME LAYERS INPUTS FOLDER`: a random model, cut to so many layers (0: all): weights and features.
`load FOLDER INPUTS`: the features of a local folder, through create_model_and_transforms and get_tokenizer, its scale
and its bias; with one, the sigmoid loss of these pairs too.
`huggingface FOLDER INPUTS`: the features of a local folder in transformers' CLIPModel, and its tokenizer's ids.
All write FOLDER/features.npz; INPUTS is an .npz of pixels uint8 [B, height, width, 3] and caption_ids int64 [B, L].
"""

import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.loss import SigLipLoss
from PIL import Image
from safetensors.torch import save_file


def features(model, pixels, caption_ids):
    """Unit features of raw pixels, normalised as the model's own preprocess does."""
    values = model.visual.preprocess_cfg
    mean, std = (torch.tensor(values[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    return encoded(model, images, torch.from_numpy(caption_ids))


def encoded(model, images, caption_ids):
    with torch.no_grad():
        found = model.encode_image(images, normalize=True), model.encode_text(caption_ids, normalize=True)
    return [each.numpy() for each in found]


def create(name, layers, inputs, folder):
    torch.manual_seed(0)
    config = open_clip.get_model_config(name)
    if int(layers):
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = int(layers)
    values = np.load(inputs)
    config["text_cfg"]["context_length"] = values["caption_ids"].shape[1]
    mean, std = values["mean"], values["std"]
    model = open_clip.CLIP(**config).eval()
    open_clip.factory.set_model_preprocess_cfg(model, {"mean": mean.tolist(), "std": std.tolist()})
    with torch.no_grad():  # nothing stays at zero or one, so that no parameter can go unused unseen
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    image, text = features(model, values["pixels"], values["caption_ids"])
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, Path(folder) / "model.safetensors"
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    np.savez(Path(folder) / "features.npz", image=image, text=text, num_parameters=num_parameters)


def load(folder, inputs):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    values = np.load(inputs)
    image, text = features(model, values["pixels"], values["caption_ids"])
    found = {"image": image, "text": text, "scale": model.logit_scale.exp().item()}
    if model.logit_bias is not None:
        found["bias"] = model.logit_bias.item()
        pair = [torch.from_numpy(each) for each in (image, text)]
        with torch.no_grad():
            found["loss"] = SigLipLoss()(*pair, model.logit_scale.exp(), model.logit_bias).item()
    if "picture" in values:
        picture = preprocess(Image.fromarray(values["picture"]))[None]
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(values["sentences"].tolist())
        found["picture"], found["tokens"] = picture.numpy(), tokens.numpy()
        found["picture_features"], found["sentence_features"] = encoded(model, picture, tokens)
    np.savez(Path(folder) / "features.npz", **found)


def huggingface(folder, inputs):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model, loading = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    values = np.load(inputs)
    processor = CLIPImageProcessor.from_pretrained(folder)
    images = processor(images=list(values["pixels"]), return_tensors="pt").pixel_values
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(values["sentences"].tolist(), padding="max_length", truncation=True, return_tensors="np")
    with torch.no_grad():
        found = model.eval()(input_ids=torch.from_numpy(values["caption_ids"]), pixel_values=images)
    tokens = tokens.input_ids
    np.savez(Path(folder) / "features.npz", image=found.image_embeds, text=found.text_embeds, tokens=tokens)


if __name__ == "__main__":
    {"create": create, "load": load, "huggingface": huggingface}[sys.argv[1]](*sys.argv[2:])
