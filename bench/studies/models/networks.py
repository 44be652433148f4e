"""NETWORKS: convolutional networks of timm and torchvision, small ones of every family there."""

from torch import nn

_TIMM = """
bat_resnext26ts botnet26t_256 caformer_s18 coat_lite_tiny coatnet_pico_rw_224 convformer_s18
convit_tiny convmixer_768_32 convnext_atto convnext_atto_ols convnext_tiny cs3darknet_focus_s
cs3darknet_s cs3edgenet_x cs3sedarknet_l cspdarknet53 cspresnet50 cspresnext50 darknet17
darknetaa53 densenet121 densenetblur121d dla34 dla46_c dla46x_c dla60_res2net dla60_res2next dla60x
dpn48b dpn68 dpn68b dpn92 eca_botnext26ts_256 eca_nfnet_l0 eca_resnet33ts eca_vovnet39b
ecaresnet26t ecaresnet50t ecaresnext26t_32x4d ecaresnetlight edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_b0_gn efficientnet_b1_pruned
efficientnet_cc_b0_4e efficientnet_es efficientnet_lite0 efficientnetv2_rw_t efficientvit_b0
efficientvit_m0 ese_vovnet19b_dw ese_vovnet39b fasternet_t0 fastvit_t8 fbnetc_100 fbnetv3_b
focalnet_tiny_srf gcresnet33ts gcresnext26ts gcvit_xxtiny gernet_s ghostnet_050 ghostnet_100
ghostnetv2_100 gmixer_12_224 haloregnetz_b halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0
hrnet_w18_small hrnet_w18_small_v2 inception_next_tiny inception_resnet_v2 inception_v3
inception_v4 lambda_resnet26t lcnet_050 legacy_seresnet18 legacy_seresnext26_32x4d levit_128s
maxvit_rmlp_pico_rw_256 mixnet_s mnasnet_small mobilenet_edgetpu_v2_xs mobilenetv1_100
mobilenetv2_050 mobilenetv3_large_100 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0
mobileone_s4 mobilevit_xxs mobilevitv2_050 nasnetalarge nest_tiny nf_regnet_b0 nf_resnet26
nf_seresnet26 poolformer_s12 poolformerv2_s12 pvt_v2_b0 regnetv_040 regnetx_002 regnetx_004_tv
regnety_002 regnety_008 regnetz_005 regnetz_b16 repghostnet_050 repvgg_a0 repvgg_b0 repvgg_d2se
repvit_m0_9 res2net50_14w_8s res2net50d res2next50 resnest14d resnest26d resnest50d_1s4x24d
resnet10t resnet14t resnet18 resnet18d resnet26t resnet33ts resnet50 resnet50d resnet50_gn
resnet50t resnetaa50 resnetblur18 resnetblur50 resnetrs50 resnetv2_18 resnetv2_50 resnetv2_50d_gn
resnetv2_50x1_bit resnext26ts resnext50_32x4d rexnet_100 rexnetr_100 sebotnet33ts_256 selecsls42
selecsls42b selecsls60 semnasnet_050 seresnet18 seresnet50 seresnext26d_32x4d seresnext26ts
skresnet18 skresnet50 skresnext50_32x4d spnasnet_100 starnet_s050 swiftformer_xs tf_efficientnet_b0
tf_efficientnetv2_b0 tf_mixnet_s tf_mobilenetv3_small_minimal_100 tinynet_e tresnet_m vgg11 vgg11_bn
visformer_tiny vovnet39a xception41 xception41p xcit_nano_12_p16_224
"""
_TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
mnasnet0_5 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18
resnet34 resnet50 resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 squeezenet1_0 squeezenet1_1
swin_t swin_v2_t vgg11 vgg11_bn wide_resnet50_2
"""
NETWORKS = [
    *(f"timm {name}" for name in _TIMM.split()),
    *(f"torchvision {name}" for name in _TORCHVISION.split()),
]
# What some of torchvision's take besides `weights`: they would draw their numbers for a minute.
_OPTIONS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


def create(network: str) -> nn.Module:
    """A network of NETWORKS with random weights.

    Raises:
        ModuleNotFoundError: its package is not installed.
    """
    package, name = network.split()
    if package == "timm":
        import timm

        return timm.create_model(name, pretrained=False)
    import torchvision

    return torchvision.models.get_model(name, weights=None, **_OPTIONS.get(name, {}))


def image_size(network: str, model: nn.Module, wanted: int) -> int:
    """Pixels a side: as wanted, or what the network insists on."""
    config = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", {})
    if network in ("torchvision inception_v3", "timm inception_v3"):
        return 128
    fixed = config.get("fixed_input_size", False) or network.startswith("torchvision maxvit")
    if fixed:
        return int(config.get("input_size", (3, 224, 224))[1])
    return max(wanted, int(config.get("min_input_size", (3, wanted, wanted))[1]))
