"""Small networks of keras-hub: one of each kind that normalizes by batch.

Imported where keras-hub is installed.
"""

import inspect
import re
from pathlib import Path

import keras
import keras_hub
from keras_hub import models

SHAPE = (32, 32, 3)


def resnet(**arguments):
    return models.ResNetBackbone(
        **{
            "input_conv_filters": [64],
            "input_conv_kernel_sizes": [3],
            "stackwise_num_filters": [64, 16],
            "stackwise_num_blocks": [1, 1],
            "stackwise_num_strides": [1, 2],
            "block_type": "basic_block",
            "image_shape": SHAPE,
            **arguments,
        }
    )


def pyramid_resnet(shape=SHAPE):
    """One that has the levels P2 to P5."""
    return resnet(
        stackwise_num_filters=[64, 16, 16, 16],
        stackwise_num_blocks=[1, 1, 1, 1],
        stackwise_num_strides=[1, 2, 2, 2],
        image_shape=shape,
    )


def efficientnet(kind):
    return models.EfficientNetBackbone(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[1, 2],
        stackwise_input_filters=[8, 8],
        stackwise_output_filters=[8, 8],
        stackwise_expansion_ratios=[1, 2],
        stackwise_strides=[1, 2],
        stackwise_squeeze_and_excite_ratios=[0.25, 0.25],
        stackwise_block_types=[kind] * 2,
        num_features=16,
        image_shape=SHAPE,
    )


def hgnetv2(shape=SHAPE, **arguments):
    return models.HGNetV2Backbone(
        **{
            "depths": [1, 1],
            "embedding_size": 8,
            "hidden_sizes": [16, 16],
            "stem_channels": [3, 8, 8],
            "hidden_act": "relu",
            "use_learnable_affine_block": True,
            "stackwise_stage_filters": [
                (8, 8, 16, 1, 1, 3),
                (16, 8, 16, 1, 1, 3),
            ],
            "apply_downsample": [False, True],
            "use_lightweight_conv_block": [False, True],
            "image_shape": shape,
            **arguments,
        }
    )


def mobilenet():
    return models.MobileNetBackbone(
        stackwise_expansion=[[8, 8], [16]],
        stackwise_num_blocks=[2, 1],
        stackwise_num_filters=[[8, 8], [8]],
        stackwise_kernel_size=[[3, 3], [5]],
        stackwise_num_strides=[[2, 1], [2]],
        stackwise_se_ratio=[[None, None], [0.25]],
        stackwise_activation=[["relu", "relu"], ["hard_swish"]],
        stackwise_padding=[[1, 1], [2]],
        output_num_filters=16,
        depthwise_filters=8,
        depthwise_stride=1,
        depthwise_residual=False,
        last_layer_filter=16,
        squeeze_and_excite=0.5,
        image_shape=SHAPE,
    )


def mobilenetv5():
    return models.MobileNetV5Backbone(
        stackwise_block_types=[["er"], ["uir"]],
        stackwise_num_blocks=[1, 1],
        stackwise_num_filters=[[8], [16]],
        stackwise_strides=[[2], [2]],
        stackwise_act_layers=[["relu"], ["relu"]],
        stackwise_exp_ratios=[[2.0], [2.0]],
        stackwise_se_ratios=[[0.0], [0.0]],
        stackwise_dw_kernel_sizes=[[0], [5]],
        stackwise_dw_start_kernel_sizes=[[0], [0]],
        stackwise_dw_end_kernel_sizes=[[0], [0]],
        stackwise_exp_kernel_sizes=[[3], [0]],
        stackwise_pw_kernel_sizes=[[1], [0]],
        stackwise_num_heads=[[0], [0]],
        stackwise_key_dims=[[0], [0]],
        stackwise_value_dims=[[0], [0]],
        stackwise_kv_strides=[[0], [0]],
        stackwise_use_cpe=[[False], [False]],
        use_msfa=False,
        stem_size=8,
        num_features=16,
        norm_layer="batch_norm",
        image_shape=SHAPE,
    )


def retinanet():
    return models.RetinaNetBackbone(
        image_encoder=pyramid_resnet((64, 64, 3)),
        min_level=3,
        max_level=5,
        use_p5=False,
        use_fpn_batch_norm=True,
        image_shape=(64, 64, 3),
    )


def deeplab_v3():
    return models.DeepLabV3Backbone(
        image_encoder=pyramid_resnet(),
        projection_filters=8,
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P5",
        upsampling_size=8,
        dilation_rates=[2],
        image_shape=SHAPE,
    )


def segformer():
    return models.SegFormerBackbone(
        image_encoder=models.MiTBackbone(
            image_shape=SHAPE,
            num_layers=2,
            hidden_dims=[8, 16],
            layerwise_depths=[1, 1],
            layerwise_num_heads=[1, 1],
            layerwise_sr_ratios=[2, 1],
            layerwise_patch_sizes=[7, 3],
            layerwise_strides=[4, 2],
            max_drop_path_rate=0.1,
        ),
        projection_filters=8,
    )


def d_fine():
    return models.DFineBackbone(
        backbone=hgnetv2((64, 64, 3), out_features=["stage1", "stage2"]),
        decoder_in_channels=[16, 16],
        encoder_hidden_dim=16,
        num_denoising=0,
        num_labels=4,
        hidden_dim=16,
        learn_initial_query=False,
        num_queries=8,
        anchor_image_size=(64, 64),
        feat_strides=[4, 8],
        num_feature_levels=2,
        encoder_in_channels=[16, 16],
        encode_proj_layers=[1],
        num_attention_heads=2,
        encoder_ffn_dim=16,
        num_encoder_layers=1,
        hidden_expansion=0.5,
        depth_multiplier=0.5,
        eval_idx=-1,
        num_decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        decoder_n_points=[2, 2],
        lqe_hidden_dim=8,
        num_lqe_layers=2,
        out_features=["stage1", "stage2"],
        image_shape=(64, 64, 3),
        seed=0,
    )


def basnet():
    return models.BASNetBackbone(
        image_encoder=pyramid_resnet((None, None, 3)),
        num_classes=1,
        projection_filters=64,
        image_shape=(64, 64, 3),
    )


def cspnet(stage, block):
    return models.CSPNetBackbone(
        stem_filters=8,
        stem_kernel_size=3,
        stem_strides=1,
        stackwise_depth=[1, 2],
        stackwise_strides=[1, 2],
        stackwise_num_filters=[8, 16],
        stage_type=stage,
        block_type=block,
        # Of the second stage: half of it goes past the blocks.
        bottle_ratio=[1.0] if stage == "dark" else [0.5, 1.0],
        block_ratio=[1.0] if stage == "dark" else [1.0, 0.5],
        expand_ratio=[1.0] if stage == "dark" else [2.0, 1.0],
        image_shape=SHAPE,
    )


BACKBONES = {
    "ResNet": resnet,
    "ResNet V2": lambda: resnet(use_pre_activation=True),
    "DenseNet": lambda: models.DenseNetBackbone(
        stackwise_num_repeats=[1, 2], growth_rate=4, image_shape=SHAPE
    ),
    "CSPNet dark": lambda: cspnet("dark", "dark_block"),
    "CSPNet csp": lambda: cspnet("csp", "bottleneck_block"),
    "CSPNet cs3": lambda: cspnet("cs3", "edge_block"),
    "EfficientNet v1": lambda: efficientnet("v1"),
    "EfficientNet fused": lambda: efficientnet("fused"),
    "EfficientNet unfused": lambda: efficientnet("unfused"),
    "EfficientNet cba": lambda: efficientnet("cba"),
    "HGNetV2": hgnetv2,
    "MobileNet": mobilenet,
    "MobileNetV5": mobilenetv5,
    "Xception": lambda: models.XceptionBackbone(
        stackwise_conv_filters=[[8, 8], [8, 8]],
        stackwise_pooling=[True, False],
        image_shape=SHAPE,
    ),
    "RetinaNet": retinanet,
    "DeepLabV3": deeplab_v3,
    "SegFormer": segformer,
    "DFine": d_fine,
    "BASNet": basnet,
}

# What reads their outputs: a classifier, segmenters, detectors.
TASKS = {
    "ResNet classifier": lambda: models.ResNetImageClassifier(
        resnet(), num_classes=3
    ),
    "DeepLabV3 segmenter": lambda: models.DeepLabV3ImageSegmenter(
        deeplab_v3(), num_classes=3
    ),
    "BASNet segmenter": lambda: models.BASNetImageSegmenter(basnet()),
    "RetinaNet detector": lambda: models.RetinaNetObjectDetector(
        retinanet(), num_classes=3, pre_logits_num_conv_layers=1
    ),
    "DFine detector": lambda: models.DFineObjectDetector(
        d_fine(), num_classes=3
    ),
}


# What the code of keras-hub makes and never calls: it may be built, or not.
UNCALLED = {
    "BASNet": ["conv1_bn"],
    "BASNet segmenter": ["conv1_bn"],
    "RetinaNet": ["output_norm_P5", "output_norm_P4", "output_norm_P3"],
    "RetinaNet detector": [
        "output_norm_P5",
        "output_norm_P4",
        "output_norm_P3",
    ],
}
UNBUILT = ("EfficientNet unfused",)


def before_choices(model):
    """The model up to where it chooses, or the model itself if it does not.

    D-FINE goes on with the positions of the best scores. Positions of random
    images in a random network have scores that are closer to each other
    (1e-7, and some are equal) than rounding (5e-7): other kernels put them in
    another order, and the boxes come in that order.
    """
    is_detector = isinstance(model, models.DFineObjectDetector)
    backbone = model.backbone if is_detector else model
    if not isinstance(backbone, models.DFineBackbone):
        return model
    outputs = {
        name: tensor
        for name, tensor in backbone.output.items()
        if name.startswith(("encoder_", "enc_outputs_"))
    }
    return keras.Model(backbone.input, outputs)


def class_of(name):
    """The name of the class of an entry of BACKBONES."""
    return f"{name.split()[0]}Backbone"


def backbones_with_batch_normalization():
    """Names of keras-hub's backbones whose code has batch normalization.

    In the folder of the class, or in one of those that it imports from.
    """
    root = Path(inspect.getfile(keras_hub)).parent / "src" / "models"
    code = {
        folder.name: "\n".join(
            each.read_text(encoding="utf-8") for each in folder.glob("*.py")
        )
        for folder in root.iterdir()
        if folder.is_dir()
    }
    imported = {
        name: set(re.findall(r"keras_hub\.src\.models\.(\w+)\.", text))
        for name, text in code.items()
    }

    def has_it(name, seen):
        if "BatchNormalization" in code.get(name, ""):
            return True
        new = imported.get(name, set()) - seen
        return any(has_it(each, seen | new) for each in new)

    found = set()
    for name in dir(models):
        if name.endswith("Backbone"):
            folder = Path(inspect.getfile(getattr(models, name))).parent.name
            if has_it(folder, {folder}):
                found.add(name)
    return found
