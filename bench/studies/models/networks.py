"""FAMILIES and NETWORKS: small convolutional networks of timm and torchvision."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from resfuse.bench.common.selection import pick
from resfuse.bench.models import sources
from resfuse.bench.models.model_builder import build
from resfuse.bench.models.sources import FILES

# family -> names in timm, names in torchvision
FAMILIES = {
    "RepVGG": (
        "repvgg_a0 repvgg_b0 repvgg_d2se",
        "",
    ),
    "MobileOne": (
        "mobileone_s0 mobileone_s4",
        "",
    ),
    "RegNet": (
        "regnetv_040 regnetx_002 regnetx_004_tv regnety_002 regnety_008 regnetz_005 regnetz_b16",
        "regnet_x_400mf regnet_x_8gf regnet_y_1_6gf regnet_y_400mf",
    ),
    "ConvNeXt": (
        "convnext_atto convnext_atto_ols convnext_tiny",
        "convnext_tiny",
    ),
    "EfficientNet": (
        "efficientnet_b0 efficientnet_b0_gn efficientnet_b1_pruned efficientnet_cc_b0_4e "
        "efficientnet_es efficientnet_lite0 efficientnetv2_rw_t tf_efficientnet_b0 "
        "tf_efficientnetv2_b0",
        "efficientnet_b0 efficientnet_v2_s",
    ),
    "GhostNet": (
        "ghostnet_050 ghostnet_100 ghostnetv2_100 repghostnet_050",
        "",
    ),
    "DPN": (
        "dpn48b dpn68 dpn68b dpn92",
        "",
    ),
    "HRNet": (
        "hrnet_w18_small hrnet_w18_small_v2",
        "",
    ),
    "DLA": (
        "dla34 dla46_c dla46x_c dla60x",
        "",
    ),
    "VoVNet": (
        "eca_vovnet39b ese_vovnet19b_dw ese_vovnet39b vovnet39a",
        "",
    ),
    "SelecSLS": (
        "selecsls42 selecsls42b selecsls60",
        "",
    ),
    "ResNeSt": (
        "resnest14d resnest26d resnest50d resnest50d_1s4x24d",
        "",
    ),
    "SKNet": (
        "skresnet18 skresnet50 skresnext50_32x4d",
        "",
    ),
    "VGG and AlexNet": (
        "vgg11 vgg11_bn",
        "alexnet vgg11 vgg11_bn",
    ),
    "DenseNet": (
        "densenet121 densenetblur121d",
        "densenet121",
    ),
    "Inception and GoogLeNet": (
        "inception_resnet_v2 inception_v3 inception_v4",
        "googlenet inception_v3",
    ),
    "Xception and NASNet": (
        "nasnetalarge xception41 xception41p",
        "",
    ),
    "SqueezeNet and ShuffleNet": (
        "",
        "shufflenet_v2_x0_5 shufflenet_v2_x1_0 squeezenet1_0 squeezenet1_1",
    ),
    "MobileNet": (
        "lcnet_050 mobilenet_edgetpu_v2_xs mobilenetv1_100 mobilenetv2_050 "
        "mobilenetv3_large_100 mobilenetv3_small_050 mobilenetv4_conv_small "
        "tf_mobilenetv3_small_minimal_100",
        "mobilenet_v2 mobilenet_v3_large mobilenet_v3_small",
    ),
    "MNASNet, MixNet, FBNet, TinyNet": (
        "fbnetc_100 fbnetv3_b hardcorenas_a mixnet_s mnasnet_small semnasnet_050 spnasnet_100 "
        "tf_mixnet_s tinynet_e",
        "mnasnet0_5 mnasnet1_0",
    ),
    "ReXNet": (
        "rexnet_100 rexnetr_100",
        "",
    ),
    "Res2Net": (
        "dla60_res2net dla60_res2next res2net50_14w_8s res2net50d res2next50",
        "",
    ),
    "DarkNet and CSPNet": (
        "cs3darknet_focus_s cs3darknet_s cs3edgenet_x cs3sedarknet_l cspdarknet53 cspresnet50 "
        "cspresnext50 darknet17 darknetaa53",
        "",
    ),
    "NFNet (no norms)": (
        "eca_nfnet_l0 nf_regnet_b0 nf_resnet26 nf_seresnet26",
        "",
    ),
    "BoTNet, HaloNet and LambdaNet": (
        "bat_resnext26ts botnet26t_256 eca_botnext26ts_256 haloregnetz_b halonet26t "
        "lambda_resnet26t sebotnet33ts_256",
        "",
    ),
    "ResNet v2 (pre-activation)": (
        "resnetv2_18 resnetv2_50 resnetv2_50d_gn resnetv2_50x1_bit",
        "",
    ),
    "SE-, ECA- and GC-ResNet": (
        "eca_resnet33ts ecaresnet26t ecaresnet50t ecaresnext26t_32x4d ecaresnetlight "
        "gcresnet33ts gcresnext26ts legacy_seresnet18 legacy_seresnext26_32x4d seresnet18 "
        "seresnet50 seresnext26d_32x4d seresnext26ts",
        "",
    ),
    "ResNet, ResNeXt and Wide ResNet": (
        "gernet_s resnet10t resnet14t resnet18 resnet18d resnet26t resnet33ts resnet50 "
        "resnet50d resnet50_gn resnet50t resnetaa50 resnetblur18 resnetblur50 resnetrs50 "
        "resnext26ts resnext50_32x4d tresnet_m",
        "resnet18 resnet34 resnet50 resnext50_32x4d wide_resnet50_2",
    ),
    "HGNet": (
        "hgnet_tiny hgnetv2_b0",
        "",
    ),
    "RepViT, FastViT, StarNet and FasterNet": (
        "fasternet_t0 fastvit_t8 inception_next_tiny repvit_m0_9 starnet_s050",
        "",
    ),
    "ConvMixer, PoolFormer and other mixers": (
        "caformer_s18 convformer_s18 convmixer_768_32 focalnet_tiny_srf gmixer_12_224 "
        "poolformer_s12 poolformerv2_s12",
        "",
    ),
    "EfficientViT, MobileViT and their like": (
        "edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvit_b0 "
        "efficientvit_m0 mobilevit_xxs mobilevitv2_050 swiftformer_xs",
        "",
    ),
    "CoAtNet and MaxViT": (
        "coatnet_pico_rw_224 maxvit_rmlp_pico_rw_256",
        "maxvit_t",
    ),
    "Other transformers": (
        "coat_lite_tiny convit_tiny gcvit_xxtiny levit_128s nest_tiny pvt_v2_b0 visformer_tiny "
        "xcit_nano_12_p16_224",
        "swin_t swin_v2_t",
    ),
}
FAMILY = {
    f"{package} {name}": family
    for family, names in FAMILIES.items()
    for package, its in zip(("timm", "torchvision"), names, strict=True)
    for name in its.split()
}  # of "timm resnet18" and the like
NETWORKS = list(FAMILY)
# What people come with most: measured before all others.
FIRST = (
    "torchvision mobilenet_v2", "torchvision mobilenet_v3_large", "torchvision efficientnet_b0",
    "torchvision efficientnet_v2_s", "timm efficientnet_lite0", "torchvision regnet_y_1_6gf",
    "torchvision regnet_x_8gf", "torchvision shufflenet_v2_x1_0", "torchvision mnasnet1_0",
    "torchvision squeezenet1_1", "torchvision googlenet", "torchvision densenet121",
    "timm resnest50d", "timm seresnet50", "torchvision convnext_tiny",
)  # fmt: skip
OTHER = "others"  # family of what is not, or no more, among the study's networks


def choose(patterns: Sequence[str], ours: Sequence[str], shown_by: str) -> list[str]:
    """The networks that are asked for: of the study, or any other with a colon or a path in its
    name (`timm:resnet50d`).

    Raises:
        UsageError: an unknown name.
    """
    known = [*ours, *NETWORKS]
    elsewhere = [p for p in patterns if (":" in p or Path(p).suffix in FILES) and p not in known]
    own = [pattern for pattern in patterns if pattern not in elsewhere]
    found = pick("--model", own, known, shown_by)
    return [*found, *sources.choose("--model", elsewhere)]


def in_turns(chosen: Sequence[str]) -> list[str]:
    """Orders networks for a run that may be cut off: those of FIRST, then one of each family after
    the other."""
    turns: dict[str, int] = {}  # family -> its networks so far
    order = {}
    for network in chosen:
        if network in FIRST:
            order[network] = (0, FIRST.index(network))
        else:
            family = FAMILY.get(network, OTHER)
            turns[family] = turns.get(family, 0) + 1
            order[network] = (turns[family], 0)
    return sorted(chosen, key=order.__getitem__)  # which keeps the order of equal ones


def model_of(network: str) -> str:
    """A network of the study, or any other model, as bench/models names it."""
    return network.replace(" ", ":", 1) if network in FAMILY else network


def create(network: str) -> nn.Module:
    """A network with random weights.

    Raises:
        UsageError: its package is not installed, or it cannot be built.
    """
    return build(model_of(network))


def image_size(network: str, model: nn.Module, wanted: int) -> int:
    """Pixels a side: as wanted, or what the network insists on."""
    config = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", {})
    if "inception_" in network and "next" not in network:  # their stems shrink too much for 64
        return max(wanted, 128)
    fixed = config.get("fixed_input_size", False) or network.startswith("torchvision maxvit")
    if fixed:
        return int(config.get("input_size", (3, 224, 224))[1])
    return max(wanted, int(config.get("min_input_size", (3, wanted, wanted))[1]))
