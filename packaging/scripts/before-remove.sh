# Before the files go for good.
if [ -d /run/systemd/system ]; then
    systemctl stop 'litefs@*.service' 'litefs@*.socket' 'litefs-control@*.socket'
    systemctl stop litefs-mount.socket litefs-mount.service
fi
