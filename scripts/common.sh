# shellcheck shell=bash
# Source this in an entry point: it turns settings from the environment into flags, and finds Python.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
NPROC=${NPROC:-1} # processes, one per GPU
RECIPE=${RECIPE---freeze-backbone --fix-lr --update-base} # the paper's stage 2

# need NAME MEANING: stop where a setting without default is not set
need() {
    if [ -z "${!1:-}" ]; then
        echo "error: $1 is not set; expected $2. Usage: DATA_PATH=... RESTORE_PATH=... bash $0" >&2
        exit 2
    fi
}

if ! [[ $NPROC =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NPROC is $NPROC; expected a number of processes >= 1" >&2
    exit 2
fi

# launch SCRIPT FLAG...: become one of the Python scripts, under torchrun where there are several processes; signals to
# the shell's process reach it
launch() {
    local script=$ROOT/$1
    shift
    if [ "$NPROC" -gt 1 ]; then
        exec python -m torch.distributed.run --standalone --nproc_per_node "$NPROC" "$script" "$@"
    else
        exec python "$script" "$@"
    fi
}

# if_set FLAG NAME: add a flag to the array $shared where its setting is set
if_set() {
    if [ -n "${!2:-}" ]; then shared+=("$1" "${!2}"); fi
}

# data_flags DATASET: flags that all three Python scripts share, into the array $shared
data_flags() {
    need DATA_PATH "the folder of the data set"
    source "$ROOT/scripts/setup_env.sh" requirements.txt # after the settings: it may have to install
    shared=(--dataset "$1" --data-dir "$DATA_PATH" --fold "${FOLD:-0}")
    # after stage 1, sizes and network are those of the checkpoint where they are not set
    if_set --model MODEL
    if_set --backbone BACKBONE
    if_set --os OS
    if_set --base-size BASE_SIZE
    if_set --test-batch-size BS_TEST
    if_set --num-workers WORKERS
    if_set --train-list TRAIN_LIST
    if_set --val-list VAL_LIST
}

# base_stage DATASET BATCH FLAG...: stage 1 with the paper's recipe
base_stage() {
    need RESTORE_PATH "a file of backbone weights (resnet50_v2.pth), imagenet with BACKBONE=resnet50, or none"
    data_flags "$1"
    local batch=$2
    shift 2
    launch train_base.py "${shared[@]}" --restore-from "$RESTORE_PATH" \
        --input-size "${INPUT_SIZE:-473,473}" --learning-rate "${LR:-1e-3}" --weight-decay "${WD:-1e-4}" \
        --batch-size "${BS:-$batch}" --num-epoch "${EPOCHS:-50}" --random-seed "${SEED:-123}" "$@"
}

# novel_stage DATASET FLAG...: the few-shot lists where they are missing, then stage 2 with the paper's recipe
novel_stage() {
    case " $RECIPE $* " in *" --rec"*) echo "these scripts pass the paper's recipe; for --recipe, run ft_pop.py itself" >&2; exit 2 ;; esac
    need RESTORE_PATH "the stage-1 checkpoint or its folder"
    data_flags "$1"
    local dataset=$1 seeds=${SEED:-123,234,345}
    shift
    # shellcheck disable=SC2206 # a list of seeds becomes words
    local lists=(--dataset "$dataset" --data-dir "$DATA_PATH" --fold "${FOLD:-0}" --shot "${SHOT:-1}" --seed ${seeds//,/ })
    if [ -n "${TRAIN_LIST:-}" ]; then lists+=(--train-list "$TRAIN_LIST"); fi
    PYTHONPATH=$ROOT python -m utils.gen_fs_list "${lists[@]}"
    if_set --input-size INPUT_SIZE
    # shellcheck disable=SC2086 # the recipe is a list of flags
    launch ft_pop.py "${shared[@]}" --restore-from "$RESTORE_PATH" --shot "${SHOT:-1}" \
        --learning-rate "${LR:-1e-3}" --weight-decay "${WD:-1e-4}" \
        --batch-size "${BS:-1}" --num-epoch "${EPOCHS:-500}" \
        --random-seed "$seeds" $RECIPE "$@"
}

# evaluation DATASET FLAG...: base and novel classes together
evaluation() {
    need RESTORE_PATH "the stage-2 folder, or FOLDER/best.pth for FOLDER/best_{seed}.pth"
    data_flags "$1"
    shift
    if_set --save-path SAVE_DIR
    launch test.py "${shared[@]}" --restore-from "$RESTORE_PATH" --shot "${SHOT:-1}" \
        --random-seed "${SEED:-123,234,345}" "$@"
}

# reproduce DATASET STAGE_2_FLAGS FLAG...: the whole grid with the paper's recipe
reproduce() {
    need DATA_PATH "the folder of the data set"
    need RESTORE_PATH "a file of backbone weights (resnet50_v2.pth), imagenet with BACKBONE=resnet50, or none"
    local dataset=$1 stage_2=$2 setting
    shift 2
    for setting in MODEL LR WD BS EPOCHS INPUT_SIZE BASE_SIZE VAL_LIST WORKERS; do
        if [ -n "${!setting:-}" ]; then
            echo "error: $setting is set, which $0 does not read; pass flags of the scripts with --flags and the like" >&2
            exit 2
        fi
    done
    local folds=${FOLD:-0 1 2 3} seeds=${SEED:-123 234 345}
    # shellcheck disable=SC2206 # lists of folds and seeds become words
    local grid=(--fold ${folds//,/ } --seed ${seeds//,/ })
    # shellcheck disable=SC2086 # so does a list of shots
    if [ -n "${SHOT:-}" ]; then set -- "$@" --shot ${SHOT//,/ }; fi
    if [ -n "${TRAIN_LIST:-}" ]; then grid+=(--train-list "$TRAIN_LIST"); fi
    source "$ROOT/scripts/setup_env.sh" requirements.txt
    export PYTHONPATH=$ROOT
    exec python -m utils.sweep --data "$dataset=$DATA_PATH" --out "${SAVE_DIR:-$ROOT/runs/$dataset}" \
        --nproc "$NPROC" "${grid[@]}" \
        --flags="--backbone ${BACKBONE:-resnet50v2} --os ${OS:-8}${BS_TEST:+ --test-batch-size $BS_TEST}" \
        --base-flags="--restore-from $(printf %q "$RESTORE_PATH")" --novel-flags="$RECIPE $stage_2" "$@"
}
