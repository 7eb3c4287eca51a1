# recipe.bash: what train_880m.sh and finetune_4k.sh share; they source it.

# write_recipe OPTIONS...: SHARDS/recipe.txt, the weights of SlimPajama's domains, where it is missing: whole or not
# there, whoever of several processes makes it. Other shards are told by a recipe of their own, or by --train among the
# OPTIONS.
write_recipe() {
    local new set files
    [ -d "$shards" ] || {
        echo "${0##*/}: $shards is not a directory; data/README.md says how to make shards" >&2
        exit 1
    }
    [ ! -e "$shards/recipe.txt" ] || return 0
    case " $* " in *" --train "* | *" --train="*) return 0 ;; esac
    for set in $(sed -n 's/^\([a-z0-9]*\)_train_.*/\1/p' "$root/data/slimpajama_weights.txt"); do
        files=("$shards/$set"_train_*.bin)  # no compgen -G, to which brackets in the folder's name are a pattern
        [ ! -e "${files[0]}" ] || continue
        echo "${0##*/}: $shards has no ${set}_train_*.bin, which SlimPajama has; of other shards write" \
            "$shards/recipe.txt, a line GLOB = WEIGHT for each set" >&2
        exit 1
    done
    new=$shards/recipe.txt.$(uname -n).$$
    cp "$root/data/slimpajama_weights.txt" "$new"
    mv "$new" "$shards/recipe.txt"
}

# choose_val EVERY WINDOWS OPTIONS...: --val (val), a set of each domain. Without such shards, and without --val among
# the OPTIONS, nothing is evaluated, which is said.
choose_val() {
    local files=("$shards"/*_val_*.bin)
    val=()
    if [ -e "${files[0]}" ]; then
        val=(--val "$shards/*_val_*.bin" --eval-every "$1" --eval-windows "$2")
    elif [ "$rank" -eq 0 ]; then
        case " $* " in *" --val "* | *" --val="*) ;; *) echo "no $shards/*_val_*.bin: nothing is evaluated" ;; esac
    fi
}

# read_launcher: how many processes there are (ranks), and which this is of all (rank) and of its host (here), by the
# launcher's variables as mta/ranks_start.h reads them: MPICH's without those of the host are set by srun --mpi=pmi2.
read_launcher() {
    local number size local
    ranks=1 rank=0 here=0
    while read -r number size local; do
        if [ "${!size:-1}" -gt 1 ]; then
            [ "$size${!local:-}" != PMI_SIZE ] || [ "${!size}" != "${SLURM_STEP_NUM_TASKS:-}" ] || continue
            ranks=${!size} rank=${!number:-0}
            here=${!local:-${PMI_LOCAL_RANK:-${FLUX_TASK_LOCAL_ID:-${LOCAL_RANK:-0}}}}
            return
        fi
    done <<< "RANK WORLD_SIZE LOCAL_RANK
OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK
PMI_RANK PMI_SIZE MPI_LOCALRANKID
SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID"
}

# choose_batch SEQUENCES OPTIONS...: the largest micro-batch (batch) that fits and divides the SEQUENCES of a step and,
# of several processes, its share of them. The plan with these options is made by a process alone, on the GPU that this
# one will have, and with the shards of the checkpoint in `out` that goes on: of more than one for each process the sums
# wait in arenas of their own. A --batch-size among the OPTIONS holds, since they stand behind this one.
choose_batch() {
    local sequences=$1 gpus=${CUDA_VISIBLE_DEVICES:-} plan=() fits saved b
    shift
    read_launcher
    batch=1
    case " $* " in *" --batch-size "* | *" --batch-size="*) return ;; esac
    if [ "$ranks" -gt 1 ]; then
        case $gpus in *,*) gpus=$(cut -d, -f$((here + 1)) <<< "$gpus") ;; "") gpus=$here ;; esac
        plan=(--ranks "$ranks")
    fi
    saved=$(sed -n 's/^  "shards": \([0-9]*\),$/\1/p' "${out:-}"/step-*/trainer.json 2> /dev/null | tail -n 1) || true
    if [ "${saved:-1}" -gt 1 ] && [ $((saved % ranks)) -eq 0 ]; then plan+=(--shards "$saved"); fi
    fits=$(env -u WORLD_SIZE -u OMPI_COMM_WORLD_SIZE -u PMI_SIZE -u SLURM_STEP_NUM_TASKS \
        ${gpus:+CUDA_VISIBLE_DEVICES="$gpus"} "$trainer" --batch-size 1 --dry-run "${plan[@]}" "$@" |
        sed -n 's/.*largest micro-batch that fits: \([0-9]*\).*/\1/p')
    for ((b = 2; b <= sequences / ranks; b *= 2)); do
        if [ "$b" -le "${fits:-0}" ]; then batch=$b; fi
    done
    if [ "$rank" -eq 0 ]; then echo "micro-batches of $batch sequences (${fits:-no free GPU, so 1} would fit)"; fi
}
