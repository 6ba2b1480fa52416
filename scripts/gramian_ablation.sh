#!/usr/bin/env bash
# Reproduce the ablations of the Gramian attention heads (arXiv:2310.16483): Table 2, branches and
# lambda, and Table 3, backbones, whose rows are the main table's. Prints the paper's figures beside
# ours, and the paper's alone for networks and heads that are not the Gramian ones. `train` trains
# the recipes of configs/gramian, `eval` validates their runs.
set -euo pipefail

# Lambda has no effect on a single branch: it is its own mean (the recipes say more). Images per
# second are the paper's, on a GPU that it does not name where we could read it.
readonly TABLES='Table 2|Network|Head|Branches|Lambda|Params, paper|Ours|Top-1, paper|Top-1, ours
-|ResNet50|GAP-FC|1|-|25.9M|-|75.3
-|ResNet50|GAP-FC|10|-|44.0M|-|75.7
-|ResNet50|CaiT|1|-|21.8M|-|76.7
-|ResNet50|CaiT|5|-|38.5M|-|77.0
ablation_resnet50_branches1_lam0|ResNet50|Gram|1|0|22.4M|22.36M|78.0
ablation_resnet50_branches5_lam0|ResNet50|Gram|5|0|41.3M|41.29M|79.1
ablation_resnet50_branches1_lam0.4|ResNet50|Gram|1|-0.4|22.4M|22.36M|77.9
ablation_resnet50_branches5_lam0.4|ResNet50|Gram|5|-0.4|41.3M|41.29M|79.2
ablation_resnet50_branches1_lam0.8|ResNet50|Gram|1|-0.8|22.4M|22.36M|76.3
ablation_resnet50_branches5_lam0.8|ResNet50|Gram|5|-0.8|41.3M|41.29M|79.3
-|ViT-S|GAP-FC|1|-|22.1M|-|76.3
-|ViT-S|GAP-FC|20|-|29.4M|-|76.3
-|ViT-S|ViT|1|-|22.1M|-|75.3
-|ViT-S|ViT|20|-|29.4M|-|75.4
-|ViT-S|CaiT|1|-|22.8M|-|75.2
-|ViT-S|CaiT|5|-|27.3M|-|75.3
ablation_vit_small_branches1_lam0|ViT-S|Gram|1|0|22.9M|22.87M|78.3
ablation_vit_small_branches5_lam0|ViT-S|Gram|5|0|27.7M|27.67M|78.4
ablation_vit_small_branches1_lam0.4|ViT-S|Gram|1|-0.4|22.9M|22.87M|78.3
ablation_vit_small_branches5_lam0.4|ViT-S|Gram|5|-0.4|27.7M|27.67M|78.5
ablation_vit_small_branches1_lam0.8|ViT-S|Gram|1|-0.8|22.9M|22.87M|78.2
ablation_vit_small_branches5_lam0.8|ViT-S|Gram|5|-0.8|27.7M|27.67M|78.9

Table 3|Network|Params, paper|Ours|GFLOPs, paper|GMACs, ours|Images/s, paper|Top-1, paper|Top-1, ours
-|RSB-ResNet50|25.6M|-|4.1|-|3409|79.8
ga_resnet50|GA-ResNet50|41.3M|41.29M|5.2|4.73|2145|82.5
-|RSB-ResNet152|60.2M|-|11.6|-|1463|81.8
-|ViT-S|22.1M|-|4.2|-|2556|79.8
ga_vit_small|GA-ViT-S|27.7M|27.67M|4.3|4.61|2289|80.9
ga_vit_medium|GA-ViT-M|60.5M|60.48M|9.6|10.04|1322|82.6
-|ViT-B|86.6M|-|16.9|-|987|81.8
-|ConvNeXt-T|28.6M|-|4.5|-|2098|82.1
ga_convnext_tiny|GA-ConvNeXt-T|48.7M|47.82M|6.3|5.24|1452|83.2
-|ConvNeXt-S|50.2M|-|8.7|-|1282|83.1
ga_convnext_small|GA-ConvNeXt-S|70.4M|70.12M|10.5|9.60|967|83.9
-|ConvNeXt-B|88.6M|-|15.4|-|903|83.8
ga_convnext_base|GA-ConvNeXt-B|124.3M|123.69M|19.0|16.89|668|84.3
-|ConvNeXt-L|197.8M|-|34.4|-|507|84.3'
# One output folder for the paper's tables: what one script has trained, the other takes up.
readonly RECIPES=configs/gramian PROCESSES=2 OUTPUT=output/gramian WEIGHTS=''

# shellcheck source=scripts/_table.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_table.sh"
