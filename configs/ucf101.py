"""UCF-101, class-conditional, 16 x 64 x 64: the paper's rows of tables 5 and 6.

    python train.py --config=configs/ucf101.py:all --workdir=runs/ucf101 \\
        --config.data.source=ucf101:DIR

DIR has the videos in a folder per class and the official lists in ucfTrainTestlist/. With
`:autoencoder` done, `:content` and `:motion` can be trained at the same time on two machines.

    stage        network                                      batch  Adam                steps
    autoencoder  dim 384, depth 8 + 8, patch 2, D 8 (47.4 M)     24  1e-5, b 0.5 / 0.9   500,000
    content      DiT-L/2, learned sigma (458 M)                 256  1e-4                112,000
    motion       DiT-L/2, content patch 4 (458 M)               256  1e-4, clip 1        112,000

The steps of the diffusion stages are the paper's 3,000 epochs of the official split's 9,537
training videos; the paper does not give the autoencoder's, 500,000 are our choice. The paper's
text names DiT-XL/2 for the content frame, its code DiT-L/2, which is used here. Guidance 4 is the
scale of null + 4 (conditional - null). The published result: FVD 107 (2,048 videos), 73 (10,000).
We have not trained this to the end; on 64 TPU v5e chips the stages would take 4, 5 and 3 hours at
40 % of their peak (docs/pods.md).
"""

from configs import common


def get_config(arg: str = 'all'):
    config = common.base()
    config['data']['source'] = 'ucf101:'
    config['autoencoder']['train']['steps'] = 500_000
    config['content']['train']['steps'] = 112_000
    config['motion']['train']['steps'] = 112_000
    return common.finish(config, arg)
